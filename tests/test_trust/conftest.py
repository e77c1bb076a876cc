"""One thread: thousands of tiny calls, on machines where threads may have to wait for each other."""

import importlib.util

import pytest
import torch

# a machine with a GPU that has only what training needs still runs the rest
HAS_HYPOTHESIS = importlib.util.find_spec('hypothesis') is not None
collect_ignore_glob = [] if HAS_HYPOTHESIS else ['test_*_properties.py', 'test_cases.py']


def pytest_terminal_summary(terminalreporter):
    """Say what was left out."""
    if not HAS_HYPOTHESIS:
        terminalreporter.write_line('hypothesis is not installed: the property tests of test_trust were left out')


@pytest.fixture(autouse=True)
def _one_thread(_few_threads_and_poison):
    torch.set_num_threads(1)

"""Shared fixtures: reference data, deterministic filling, and memory that shows when an output was not written."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fill import fill_module, make_input

DATA = Path(__file__).parent / 'data'
# torch reads this once, at the first matrix product on a GPU under deterministic algorithms, whichever test that is in
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
IS_WORKER = 'PYTEST_XDIST_WORKER' in os.environ
LONG = (
    'test_docs_commands',
    'test_tools/test_',
    'test_training/',
    'test_compile',
    'export',
    'test_packaging',
    'test_module_properties',
    'test_triton',
    'test_registration',
    'test_transforms',
    'test_adding_an_op',
)
# a machine with a GPU that has only what training needs still runs the rest
HAS_HYPOTHESIS = importlib.util.find_spec('hypothesis') is not None
collect_ignore_glob = ['data/*'] if HAS_HYPOTHESIS else ['data/*', 'test_*properties.py', 'test_cases.py']


def pytest_terminal_summary(terminalreporter):
    """Say what was left out."""
    if not HAS_HYPOTHESIS:
        terminalreporter.write_line('hypothesis is not installed: the property tests were left out')


def pytest_collection_modifyitems(items):
    """Of worker processes (pytest-xdist), which take files one by one: those that take long come first."""
    if IS_WORKER:
        items.sort(key=lambda item: not any(part in item.nodeid for part in LONG))


@pytest.fixture(autouse=True)
def _few_threads_and_poison():
    """Two threads, or one of a worker; and ``torch.empty`` filled with NaN, so that an element nobody wrote is seen.

    torch fills only while deterministic algorithms are asked for.
    """
    torch.set_num_threads(1 if IS_WORKER else 2)
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False  # torch's default on a GPU, of three digits
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope='session')
def tables():
    """Published parameter counts, FLOPs, keyword arguments and state-dict shapes, those of further options included."""
    main, extra = (json.loads((DATA / name).read_text()) for name in ('tables.json', 'extra_tables.json'))
    return {**extra, **main, 'variants': {**main['variants'], **extra['variants']}}


@pytest.fixture(scope='session')
def model_reference():
    """Logits, features and gradients of the published code on filled models, with further options too."""
    return {**np.load(DATA / 'model_reference.npz'), **np.load(DATA / 'extra_reference.npz')}


@pytest.fixture(scope='session')
def op_reference():
    """Selective scan and index maps of the published code in float64."""
    return dict(np.load(DATA / 'op_reference.npz'))


@pytest.fixture(scope='session')
def filled():
    """Function that fills a module's parameters by the reference's rule."""
    return fill_module


@pytest.fixture(scope='session')
def image():
    """Function (height, width) -> the reference's image batch (2, 3, H, W)."""
    return lambda height, width: torch.from_numpy(make_input(height, width))

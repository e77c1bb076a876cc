"""One thread: thousands of tiny calls, on machines where threads may have to wait for each other."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_few_threads_and_poison):
    torch.set_num_threads(1)

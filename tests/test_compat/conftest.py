"""The provided names for one test at a time; afterwards nothing of them is left in the process."""

import sys

import pytest
import torch

from mmvmamba import compat
from mmvmamba.compat.finder import FINDER, NAMES, REPLACEMENT
from mmvmamba.ops import use_backend

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU is visible to torch')


def forget():
    """Take the finders and what they provided out of the process."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in (FINDER, REPLACEMENT)]
    REPLACEMENT.names.clear()
    for name in [name for name in sys.modules if name.partition('.')[0] in NAMES]:
        del sys.modules[name]


@pytest.fixture
def clean():
    """No provided names before the test, and none after it."""
    forget()
    yield
    forget()


@pytest.fixture
def names(clean):
    """The provided names, whatever is installed."""
    return compat.install(replace=NAMES)


COMPILED = ['cpu', pytest.param('cuda', marks=on_gpu), pytest.param('triton', marks=on_gpu)]


@pytest.fixture(params=['naive', *COMPILED])
def device(request):
    """The device of each backend, on which the test runs."""
    with use_backend(request.param, ops=['selective_scan']):
        yield 'cuda' if request.param in ('cuda', 'triton') else 'cpu'


@pytest.fixture(params=COMPILED)
def fast_device(request):
    """The device of each compiled backend, on which the test runs: for long sequences."""
    with use_backend(request.param, ops=['selective_scan']):
        yield 'cuda' if request.param in ('cuda', 'triton') else 'cpu'

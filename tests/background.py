"""Tests that only wait for processes of their own, run on the second core from the start of the session."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

ENVIRONMENT = dict(os.environ)  # for those processes: a test that runs meanwhile may have changed its own
_pool = ThreadPoolExecutor(1)
_futures = {}


def in_background(test):
    """Let a test without fixtures run beside the others; where it stands, its result is waited for."""

    @functools.wraps(test)
    def wait():
        return _futures.pop(test).result() if test in _futures else test()

    wait.begin = lambda: _futures.setdefault(test, _pool.submit(test))
    return wait


def begin(items):
    """Begin those of the session's ``items`` that run in the background and are not skipped."""
    for item in items:
        skipped = item.get_closest_marker('skip') or any(any(mark.args) for mark in item.iter_markers('skipif'))
        if hasattr(item.function, 'begin') and not skipped:
            item.function.begin()


def end():
    """Begin no more; what has begun is waited for."""
    _pool.shutdown(wait=False, cancel_futures=True)

"""Property tests in two sizes: a small seeded set for ``make test``, and a large one, marked slow."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

FULL_CASES = {}
"""Cases that each property is tried on when slow tests run, by name."""


def cases(quick: int, full: int, each: int = 1, **strategies):
    """Turn a function of drawn values into a test.

    Args:
        quick (int): Cases of the seeded set, the same in every run.
        full (int): Cases of the slow set, new ones in every run; a failure prints how to repeat it.
        each (int): Cases that one call of the function tries. Default: 1.
        strategies: A hypothesis strategy for each argument.
    """

    def decorate(check):
        FULL_CASES[f'{check.__module__}.{check.__qualname__}'] = full

        @pytest.mark.parametrize('size', ['quick', pytest.param('full', marks=pytest.mark.slow)])
        def test(size):
            count = 0

            def counted(**values):
                nonlocal count
                count += each
                check(**values)

            wanted = full if size == 'full' else quick
            torch.set_num_threads(1)  # thousands of tiny calls, and threads may have to wait for each other
            torch.set_printoptions(threshold=8, edgeitems=2)  # a failing case fits a screen
            settings(
                max_examples=-(-wanted // each),
                derandomize=size == 'quick',
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.explicit, Phase.generate, Phase.shrink],
                print_blob=True,
            )(given(**strategies)(counted))()
            assert count >= wanted, f'only {count} cases of {wanted} were tried'

        test.__doc__ = check.__doc__
        return test

    return decorate


def attempt(call, *errors) -> tuple:
    """Result and message of a call: one of them is None. Only the documented error types are caught."""
    try:
        return call(), None
    except errors as error:
        return None, str(error)

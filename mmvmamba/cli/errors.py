"""Errors that a user can fix: one line, one class, one exit code."""

import argparse
import contextlib
import sys
import warnings
from typing import Callable

from mmvmamba.checkpoint import CheckpointError

EXIT_CODE = 2  # argparse's


class UserError(Exception):
    """Something that the user can fix; the message names it, what was found and what was expected."""


def run_tool(run: Callable, args: argparse.Namespace, quiet: bool = True) -> int:
    """Run a tool; an error that the user can fix is one line, without a traceback.

    Args:
        run (Callable): What the tool does.
        args (Namespace): Its only argument, the parsed command line.
        quiet (bool): Whether to hide the libraries' warnings, among which that line would be lost. Default: True.

    Returns:
        int: The exit code, 0 or 2.
    """
    try:
        with warnings.catch_warnings() if quiet else contextlib.nullcontext():
            if quiet:
                warnings.simplefilter('ignore')
            run(args)
    except (UserError, CheckpointError) as error:
        print(f'error: {error}', file=sys.stderr)
        return EXIT_CODE
    return 0


def first_line(error: Exception) -> str:
    """The first line of what an error says, or the name of its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]

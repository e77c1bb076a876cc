"""What was decided in a call that is repeated: a checkpoint's second forward pass must save what its first one did.

In between hooks and modes come and go, such as those of a tool that looks at one forward pass.
"""

import threading
from contextvars import ContextVar
from typing import Any, Callable, Hashable, Optional

import torch

requested: ContextVar = ContextVar('mmvmamba_backend', default=None)  # op, or None for all others: backend


class _Local(threading.local):
    answers: Optional[dict] = None  # those of the repeatable call that runs in this thread


_local = _Local()
_lock = threading.Lock()
active = 0  # repeatable calls that run in any thread: what is cheap to ask for, also for a compiled graph's guards


def decide(key: Hashable, answer: Callable, *arguments) -> Any:
    """``answer(*arguments)``, or in a repeated call what it was in the first one, by ``key``."""
    answers = None if not active or torch.compiler.is_compiling() else _local.answers
    if answers is None:
        return answer(*arguments)
    if key not in answers:
        answers[key] = answer(*arguments)
    return answers[key]


def constant_when_compiled(function: Callable) -> Callable:
    """Mark a function whose answer ``torch.compile`` takes as a constant of the graph.

    It is what ``torch.compiler.assume_constant_result`` does, which first imports the compiler: 2 of the 7 seconds that
    ``import mmvmamba`` would take.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def repeatable(function: Callable) -> Callable:
    """A function whose later calls decide as the first one did, also in another thread, and use its backend."""
    return function if torch.compiler.is_compiling() else _Repeatable(function)


class _Repeatable:
    def __init__(self, function):
        self.function, self.answers, self.requested = function, {}, requested.get()

    def __call__(self, *arguments):
        outer, _local.answers = _local.answers, self.answers
        token = requested.set(self.requested)
        _count(1)
        try:
            return self.function(*arguments)
        finally:
            _count(-1)
            requested.reset(token)
            _local.answers = outer


def _count(change: int) -> None:
    global active
    with _lock:
        active += change

"""Hooks that keep a training run safe (whole checkpoints, exact resuming, a stop at the first NaN) and fast."""

from .atomic_checkpoint import AtomicCheckpointHook
from .compile import CompileHook
from .deferred_info import DeferredInfoHook
from .exact_resume import ExactResumeHook
from .nan_guard import NaNGuardHook, NonFiniteError
from .older_run import ResumeOlderRunHook
from .prefetch import PrefetchHook

__all__ = [
    'AtomicCheckpointHook',
    'CompileHook',
    'DeferredInfoHook',
    'ExactResumeHook',
    'NaNGuardHook',
    'NonFiniteError',
    'PrefetchHook',
    'ResumeOlderRunHook',
]

"""Hooks that keep a training run safe: whole checkpoints, exact resuming, older runs, a stop at the first NaN."""

from .atomic_checkpoint import AtomicCheckpointHook
from .exact_resume import ExactResumeHook
from .nan_guard import NaNGuardHook, NonFiniteError
from .older_run import ResumeOlderRunHook

__all__ = ['AtomicCheckpointHook', 'ExactResumeHook', 'NaNGuardHook', 'NonFiniteError', 'ResumeOlderRunHook']

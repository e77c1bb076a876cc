"""What importing mmvmamba sets up in the process: safe checkpoint loading, and the ops' lines in mmengine's log."""

import codecs
import logging
import os
import pickle
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log

from .loading import setup_loading


def setup_runtime() -> None:
    """Make mmengine load checkpoints safely and strictly, its own included, and forward our log lines."""
    _load_safely()
    _allow_checkpoint_classes()
    for name in ('mmvmamba.ops', 'mmvmamba.compat'):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _MMEngineHandler) for handler in logger.handlers):
            logger.addHandler(_MMEngineHandler())
            logger.setLevel(logging.INFO)
            logger.propagate = False


def _load_safely() -> None:
    """Let no loader of mmengine run code in a checkpoint.

    mmengine leaves that to torch's default, which is safe from torch 2.6 on; before, an environment variable makes it
    so, and ``TORCH_FORCE_WEIGHTS_ONLY_LOAD=0`` keeps it as it was.  Downloads it would load by torch.hub, which runs
    code in any version of torch and does not look at the hash.
    """
    if torch.__version__ < '2.6':
        os.environ.setdefault('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    setup_loading()


def _allow_checkpoint_classes() -> None:
    """Allow-list the data classes that mmengine 0.10 saves in its message hub.

    Loading with ``weights_only=True`` refuses any class that torch was not told of.  These hold numbers only; loading
    stays safe.
    """
    numpy: Any = np  # numpy 1.26 has a _core too, which is empty
    multiarray = numpy.core.multiarray if np.__version__ < '2' else numpy._core.multiarray
    dtypes = [type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'int32', 'bool')]
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            _history_statistic,
            multiarray._reconstruct,
            multiarray.scalar,
            np.ndarray,
            np.dtype,
            *dtypes,
        ]
    )
    if torch.__version__ < '2.5':  # how bytes are saved; later versions know it
        torch.serialization.add_safe_globals([codecs.encode])


def _history_statistic(owner, name: str):
    """Stands in for ``getattr`` in a checkpoint: a HistoryBuffer saves its statistics as methods of its class."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'a checkpoint asks for the attribute {name!r} of {owner!r}, which is not safe')
    return getattr(HistoryBuffer, name)


# torch < 2.6 knows what it allows by these alone
_history_statistic.__module__, _history_statistic.__qualname__ = 'builtins', 'getattr'
_history_statistic.__name__ = 'getattr'


class _MMEngineHandler(logging.Handler):
    """Send a record to the running Runner's logger, or to the console if there is none."""

    def emit(self, record: logging.LogRecord) -> None:
        print_log(record.getMessage(), logger='current', level=record.levelno)

"""What importing mmvmamba sets up in the process: safe checkpoint loading, and the ops' lines in mmengine's log."""

import logging
import pickle

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log


def setup_runtime() -> None:
    """Make mmengine's own checkpoints loadable under torch's safe loading, and forward the ops' log lines."""
    _allow_checkpoint_classes()
    logger = logging.getLogger('mmvmamba.ops')
    if not any(isinstance(handler, _MMEngineHandler) for handler in logger.handlers):
        logger.addHandler(_MMEngineHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _allow_checkpoint_classes() -> None:
    """Allow-list the data classes that mmengine 0.10 saves in its message hub.

    torch >= 2.6 loads with ``weights_only=True`` and refuses any class it was not told of.  These hold numbers only;
    loading stays safe.
    """
    if torch.__version__ < (2, 6):  # loads these anyway
        return
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    dtypes = [type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'int32', 'bool')]
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (_history_statistic, 'builtins.getattr'),
            multiarray._reconstruct,
            multiarray.scalar,
            np.ndarray,
            np.dtype,
            *dtypes,
        ]
    )


def _history_statistic(owner, name: str):
    """Stands in for ``getattr`` in a checkpoint: a HistoryBuffer saves its statistics as methods of its class."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'a checkpoint asks for the attribute {name!r} of {owner!r}, which is not safe')
    return getattr(HistoryBuffer, name)


class _MMEngineHandler(logging.Handler):
    """Send a record to the running Runner's logger, or to the console if there is none."""

    def emit(self, record: logging.LogRecord) -> None:
        print_log(record.getMessage(), logger='current', level=record.levelno)

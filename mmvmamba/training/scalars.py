"""Logged numbers that stay on the device until somebody reads them."""

from typing import Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, MessageHub

_MOST = 1000  # numbers that may wait for a reader


class PendingHistory(HistoryBuffer):
    """mmengine's ``HistoryBuffer``, which takes tensors and reads them when it is read.

    mmengine reads every loss at every iteration, and each time the host waits for the device.  Here whoever asks for
    values, such as ``LoggerHook`` at its interval or a checkpoint, causes one read of all that arrived since.  Copies
    and pickles are plain ``HistoryBuffer``s.

    Args:
        history (HistoryBuffer): What was logged so far.
    """

    _logs: np.ndarray
    _counts: np.ndarray

    def __init__(self, history: HistoryBuffer):
        self._pending: list = []
        logs, counts = history.data
        super().__init__(logs, counts, history.max_length)

    def update(self, log_val: Union[int, float, torch.Tensor], count: int = 1) -> None:
        """Append a number without reading it.

        Args:
            log_val (int | float | Tensor): The number; a tensor has one element of any real dtype on any device, and
                nobody changes it later.
            count (int): Its weight in averages. Default: 1.

        Raises:
            TypeError: If ``log_val`` or ``count`` is no number.
        """
        if isinstance(log_val, torch.Tensor):
            if log_val.numel() != 1:
                raise TypeError(f'log_val has shape {tuple(log_val.shape)}, expected a tensor with one element')
            log_val = log_val.detach().reshape(())
        elif not isinstance(log_val, (int, float)):
            raise TypeError(f'log_val is of type {type(log_val).__name__}, expected a number or a tensor with one')
        if not isinstance(count, (int, float)):
            raise TypeError(f'count is of type {type(count).__name__}, expected a number')
        self._pending.append((log_val, count))
        if len(self._pending) >= _MOST:
            self._read()

    def current(self) -> np.ndarray:
        """The newest number; one that the host knows needs no wait for the device."""
        if self._pending and not isinstance(self._pending[-1][0], torch.Tensor):
            return np.asarray(self._pending[-1][0])[()]
        return super().current()

    def _read(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        values = [value for value, _ in pending]
        kinds: dict = {}
        for i, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                kinds.setdefault((value.device, value.dtype), []).append(i)
        for places in kinds.values():
            for i, number in zip(places, torch.stack([values[i] for i in places]).tolist()):
                values[i] = number
        self._logs = np.append(self._logs, values)[-self.max_length :]
        self._counts = np.append(self._counts, [count for _, count in pending])[-self.max_length :]

    # every method of the base class, and every statistic that others register, goes through these two
    @property
    def _log_history(self) -> np.ndarray:
        self._read()
        return self._logs

    @_log_history.setter
    def _log_history(self, values) -> None:
        self._logs = np.asarray(values)

    @property
    def _count_history(self) -> np.ndarray:
        self._read()
        return self._counts

    @_count_history.setter
    def _count_history(self, values) -> None:
        self._counts = np.asarray(values)

    def __reduce__(self):
        return HistoryBuffer, (self._log_history, self._count_history, self.max_length)


def pending_history(hub: MessageHub, key: str) -> PendingHistory:
    """The history of a key, as a :class:`PendingHistory`; resumed or plain ones are made one.

    Args:
        hub (MessageHub): mmengine's message hub.
        key (str): Name of a scalar, such as ``train/loss``.
    """
    history = hub.log_scalars.get(key)
    if not isinstance(history, PendingHistory):
        hub._set_resumed_keys(key, True)
        history = hub.log_scalars[key] = PendingHistory(history if history is not None else HistoryBuffer())
    return history

"""The one place where the layers call the scan, and where a tool can step in between."""

import threading
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Callable, Optional

import torch

from mmvmamba.ops import ss2d_scan

from .cascade import cascade_scan
from .heads import scan_heads

_functions: ContextVar = ContextVar('mmvmamba_scan_functions', default=())  # the innermost interception is the last
_lock = threading.Lock()
_active = 0  # interceptions in the whole process; torch.compile guards on a number, which it can't on a ContextVar


def scan_routes(
    x: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_projs_weight: Optional[torch.Tensor],
    dt_projs_bias: torch.Tensor,
    A_logs: torch.Tensor,
    Ds: torch.Tensor,
    scan_mode: str,
    initial_state: Optional[torch.Tensor] = None,
) -> Any:
    """Scan a map along its four routes, in any of the four modes; all of SS2D between convolution and norm.

    Args:
        x (Tensor): Map (B, D, H, W), in channels_last memory.
        x_proj_weight (Tensor): (4, R + 2N, D); this and what follows as in :func:`mmvmamba.ops.ss2d_scan`.
        dt_projs_weight (Tensor): (4, D, R).
        dt_projs_bias (Tensor): (4, D).
        A_logs (Tensor): (4 D, N).
        Ds (Tensor): (4 D,).
        scan_mode (str): ``cross2d``, ``unidi``, ``bidi`` or ``cascade2d``.
        initial_state (Tensor, optional): The state before the first pixel, with core ``ssd``. Default: zeros.

    With core ``ssd`` ``dt_projs_weight`` is None, and the others have the shapes of :func:`.heads.scan_heads`.

    Returns:
        Tensor | tuple[Tensor, Tensor]: Map (B, D, H, W), in the dtype of ``x``, or of autocast; in channels_last
        memory. With ``initial_state`` also the last state.
    """
    if _active and _functions.get():
        state = () if initial_state is None else (initial_state,)
        return _call_innermost(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode, *state)
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            'torch.onnx.export does not know the scan of VMamba; mmvmamba.export.to_onnx(module, example, path) writes '
            'it in standard operators'
        )
    if dt_projs_weight is None:
        last = x.permute(0, 2, 3, 1)
        y = scan_heads(last, x_proj_weight, dt_projs_bias, A_logs, Ds, scan_mode, initial_state)
        return y.permute(0, 3, 1, 2) if initial_state is None else (y[0].permute(0, 3, 1, 2), y[1])
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    if scan_mode == 'cascade2d':
        return cascade_scan(x.permute(0, 2, 3, 1), *parameters).permute(0, 3, 1, 2)
    return ss2d_scan(x, *parameters, scan_mode)


def _call_innermost(*arguments) -> Any:
    *outer, function = _functions.get()
    token = _functions.set(tuple(outer))
    try:
        return function(*arguments)
    finally:
        _functions.reset(token)


@contextmanager
def intercept_scan(function: Callable):
    """Let every SS2D call a function instead of the scan, such as one that records or counts.

    The function takes the arguments of :func:`scan_routes`, all by position, the last one only where there is an
    initial state, and returns what that would. Where it calls :func:`scan_routes` itself, it gets the interception
    around this one, or the scan. It is called in the current thread or task only; others scan as before, also the
    thread in which autograd repeats a checkpointed forward pass on a GPU. A compiled model is compiled anew, or
    raises with ``fullgraph=True``.

    Args:
        function (Callable): ``function(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode)``.
    """
    global _active
    token = _functions.set((*_functions.get(), function))
    with _lock:
        _active += 1
    try:
        yield
    finally:
        with _lock:
            _active -= 1
        _functions.reset(token)

"""The public cross-scan and its adjoint: documented functions, argument checks, choice of backend."""

from typing import Optional

import torch

from ..backend import resolve
from ..checks import check_flag, check_map_size, check_shape, check_tensor
from . import naive
from .registration import SCAN_MODES

NUM_ROUTES = 4


def cross_scan(
    x: torch.Tensor, scan_mode: str = 'cross2d', channel_last: bool = False, backend: Optional[str] = None
) -> torch.Tensor:
    """Unfold a feature map along four scan routes, section 4.2 of `VMamba <https://arxiv.org/abs/2401.10166>`_.

    ======================  ==================================================================================
    ``scan_mode``           routes
    ======================  ==================================================================================
    ``cross2d``             row-major, column-major, row-major reversed, column-major reversed
    ``unidi``               row-major, four times
    ``bidi``                row-major twice, row-major reversed twice
    ``cascade2d``           row-major, row-major reversed, column-major, column-major reversed
    ======================  ==================================================================================

    Args:
        x (Tensor): (B, C, H, W), or (B, H, W, C) if ``channel_last``; any floating-point dtype.
        scan_mode (str): One of the four modes. Default: ``cross2d``.
        channel_last (bool): Layout of input and output. Default: False.
        backend (str, optional): See :mod:`mmvmamba.ops.backend`.

    Returns:
        Tensor: (B, 4, C, L), or (B, L, 4, C) if ``channel_last``, with L = H * W, in the dtype of ``x``.

    Raises:
        TypeError: If ``x`` is not a floating-point tensor.
        ValueError: If ``x`` is not 4-dimensional or is empty, or ``scan_mode`` is unknown, or on a GPU a map has 2**30
            pixels or more.
        BackendError: If the backend asked for can't run.
    """
    check_flag('cross_scan', 'channel_last', channel_last)
    check_tensor('cross_scan', 'x', x, 'B, H, W, C' if channel_last else 'B, C, H, W')
    check_scan_mode('cross_scan', scan_mode)
    backend = resolve('cross_scan', x.device.type, backend, torch.is_grad_enabled() and x.requires_grad)
    if backend == 'naive':
        return naive.cross_scan(x, scan_mode, channel_last)
    run = torch.ops.mmvmamba.cross_scan_triton if backend == 'triton' else torch.ops.mmvmamba.cross_scan
    return run(x, SCAN_MODES.index(scan_mode), channel_last)


def cross_merge(
    y: torch.Tensor, size: tuple, scan_mode: str = 'cross2d', channel_last: bool = False, backend: Optional[str] = None
) -> torch.Tensor:
    """Fold four scan routes back into a map and add them: the adjoint of :func:`cross_scan`.

    Args:
        y (Tensor): (B, 4, C, L), or (B, L, 4, C) if ``channel_last``; any floating-point dtype.
        size (tuple[int]): (H, W) of the map, with H * W = L.
        scan_mode (str): The mode that ``y`` was scanned with. Default: ``cross2d``.
        channel_last (bool): Layout of input and output. Default: False.
        backend (str, optional): See :mod:`mmvmamba.ops.backend`.

    Returns:
        Tensor: (B, C, H, W), or (B, H, W, C) if ``channel_last``, in the dtype of ``y``; half precision is added in
        float32.

    Raises:
        TypeError: If ``y`` is not a floating-point tensor.
        ValueError: If ``y`` has the wrong shape for ``size``, or ``scan_mode`` is unknown, or on a GPU a map has 2**30
            pixels or more.
        BackendError: If the backend asked for can't run.
    """
    op = 'cross_merge'
    check_flag(op, 'channel_last', channel_last)
    check_tensor(op, 'y', y, 'B, L, K, C' if channel_last else 'B, K, C, L')
    check_scan_mode(op, scan_mode)
    check_map_size(op, size)
    batch, channels = y.shape[0], y.shape[3 if channel_last else 2]
    length = size[0] * size[1]
    expected = (batch, length, NUM_ROUTES, channels) if channel_last else (batch, NUM_ROUTES, channels, length)
    check_shape(op, 'y', y, expected, f'{NUM_ROUTES} routes, L = H * W of size {tuple(size)}')
    backend = resolve(op, y.device.type, backend, torch.is_grad_enabled() and y.requires_grad)
    if backend == 'naive':
        return naive.cross_merge(y, size, scan_mode, channel_last)
    run = torch.ops.mmvmamba.cross_merge_triton if backend == 'triton' else torch.ops.mmvmamba.cross_merge
    return run(y, size[0], size[1], SCAN_MODES.index(scan_mode), channel_last)


def check_scan_mode(op: str, scan_mode: str) -> None:
    """Check that ``scan_mode`` is one of :data:`SCAN_MODES`."""
    if scan_mode not in SCAN_MODES:
        raise ValueError(f'{op}: scan_mode is {scan_mode!r}, expected one of {", ".join(SCAN_MODES)}')

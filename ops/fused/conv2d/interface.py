"""The convolution of channel-last maps, as an op of its own where a compiler would transpose the maps around it."""

from typing import Optional

import torch
import torch.nn.functional as F

from ...backend import takes_kernel
from ...checks import check_range, check_shape
from ..checks import KERNEL_DTYPES, check_convolution
from . import naive, registration  # noqa: F401 (which defines the op)

MAX_STEP = 2**31 - 1  # the longest stride and padding, what cudnn's integers hold
_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)  # from torch 2.7 on
FULL_CHANNELS = 8  # a multiple of this many 16-bit channels is what cudnn's gradient of the weight is made for


def conv2d_channel_last(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    stride: int = 1,
    padding: int = 0,
    out_dtype: Optional[torch.dtype] = None,
    backend: Optional[str] = None,
) -> torch.Tensor:
    """Convolve a channel-last map: the numbers of ``F.conv2d``, without a change of layout.

    On a GPU it is an op of its own, so that a compiler can't choose another layout and transpose the maps around it. So
    it is on a CPU where a compiled graph keeps maps for its gradients: torch's compiler takes all (B, H, W, C) between
    torch's own convolutions for (B, C, H, W), and writes what it keeps channel-last for that.

    Args:
        x (Tensor): (B, H, W, C_in), floating point; of its dimensions B may be 0.
        weight (Tensor): (C_out, C_in, k, k).
        bias (Tensor, optional): (C_out,). Default: None.
        stride (int): Pixels between two outputs, along both axes. Default: 1.
        padding (int): Zeros around the map. Default: 0.
        out_dtype (torch.dtype, optional): Dtype of arithmetic and result, as autocast chooses it. Default: that of
            ``x``.
        backend (str, optional): ``naive``, which is torch alone, ``cpu`` or ``cuda``; see :mod:`mmvmamba.ops.backend`.

    Returns:
        Tensor: (B, H', W', C_out) in ``out_dtype``, contiguous on a GPU; H' = (H + 2 padding - k) // stride + 1.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or ``out_dtype`` no floating-point dtype.
        ValueError: If shapes do not agree, or devices, or something is empty or out of range.
        BackendError: If the backend asked for can't run, or its kernels don't take these arguments.
    """
    dtype = check_convolution('conv2d_channel_last', x, weight, bias, out_dtype)
    kernel = weight.shape[-1]
    expected = (weight.shape[0], x.shape[-1], kernel, kernel)
    check_shape('conv2d_channel_last', 'weight', weight, expected, 'C_in is the last dimension of x, square kernels')
    for name, value, least in (('stride', stride, 1), ('padding', padding, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f'conv2d_channel_last: {name} is {value!r}, expected an integer from {least}')
        check_range('conv2d_channel_last', name, value, least, MAX_STEP)
    if min(x.shape[1:3]) + 2 * padding < kernel:
        raise ValueError(
            f'conv2d_channel_last: x has shape {tuple(x.shape)} and padding is {padding}, '
            f'too small for kernels of {kernel}x{kernel}'
        )
    x = x.to(dtype)
    wanted = backend not in (None, 'auto') or x.device.type != 'cpu' or _graph_keeps_maps()
    if wanted and takes_kernel('conv2d_channel_last', backend, _fits, x, weight, bias):
        missing = FULL_CHANNELS - int(x.shape[-1])
        if x.is_cuda and missing > 0 and x.element_size() == 2 and weight.requires_grad and torch.is_grad_enabled():
            # on an H200, 128 images of 224 x 224 to 48 channels: 0.16 ms instead of 0.37
            x, weight = F.pad(x, (0, missing)), F.pad(weight, (0, 0, 0, 0, 0, missing))
        return torch.ops.mmvmamba.conv2d_channel_last(x.contiguous(), weight, bias, stride, padding)
    return naive.conv2d_channel_last(x, weight, bias, stride, padding)


def _graph_keeps_maps() -> bool:
    """Whether a graph is compiled that may have a backward, also one past frozen convolutions; exported ones don't."""
    return torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled() and not _is_exporting()


def _fits(x, weight, bias) -> bool:
    return all(value.dtype in KERNEL_DTYPES for value in (x, weight, bias) if value is not None) and x.numel() > 0

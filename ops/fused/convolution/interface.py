"""The convolutions of channel-last maps: kernels and cudnn's own layout on a GPU, torch's convolution elsewhere."""

from typing import Optional

import torch
import torch.nn.functional as F

from ...backend import has_cuda_kernel
from ...checks import FLOAT_DTYPES, check_float, check_range, check_same_device, check_shape, dtype_name
from . import library

KERNEL_DTYPES = ('float32', 'float16', 'bfloat16')
MAX_STEP = 2**31 - 1  # the longest stride and padding, what cudnn's integers hold
FULL_CHANNELS = 8  # a multiple of this many 16-bit channels is what cudnn's gradient of the weight is made for


def depthwise_conv_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    """Convolve each channel of a map by itself, stride 1, and apply SiLU, z * sigmoid(z).

    Kernels of 3x3 weights and a multiple of 4 channels run in one CUDA kernel, whose arithmetic is float32, weights
    included, and which keeps no intermediate map for backward.  Everything else is torch's convolution and SiLU.

    Args:
        x (Tensor): (B, H, W, C), floating point; of its dimensions B may be 0.
        weight (Tensor): (C, 1, k, k), k odd; the map is padded by k // 2 zeros.
        bias (Tensor, optional): (C,). Default: None.
        out_dtype (torch.dtype, optional): Dtype of the result, to which ``x`` is rounded first, as autocast does.
            Default: that of ``x``.

    Returns:
        Tensor: (B, H, W, C) in ``out_dtype``.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or ``out_dtype`` no floating-point dtype.
        ValueError: If shapes do not agree, or devices, or something is empty or out of range.
    """
    dtype = _check('depthwise_conv_silu', x, weight, bias, out_dtype)
    channels, kernel = x.shape[-1], weight.shape[-1]
    check_shape('depthwise_conv_silu', 'weight', weight, (channels, 1, kernel, kernel), 'one kernel a channel of x')
    if kernel % 2 == 0:
        raise ValueError(f'depthwise_conv_silu: weight has kernels of {kernel}x{kernel}, expected an odd size')
    x = x.to(dtype)
    if kernel == 3 and channels % 4 == 0 and _on_gpu(x, weight, bias):
        return library.depthwise_conv_silu(x.contiguous(), weight.float(), None if bias is None else bias.float())
    y = F.conv2d(
        x.permute(0, 3, 1, 2),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        padding=int(kernel) // 2,
        groups=int(channels),
    )
    return F.silu(y).permute(0, 2, 3, 1).to(dtype)


def conv2d_channel_last(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    stride: int = 1,
    padding: int = 0,
    out_dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    """Convolve a channel-last map: the numbers of ``F.conv2d``, without a change of layout.

    On a GPU it is an op of its own, so that a compiler can't choose another layout and transpose the maps around it.

    Args:
        x (Tensor): (B, H, W, C_in), floating point; of its dimensions B may be 0.
        weight (Tensor): (C_out, C_in, k, k).
        bias (Tensor, optional): (C_out,). Default: None.
        stride (int): Pixels between two outputs, along both axes. Default: 1.
        padding (int): Zeros around the map. Default: 0.
        out_dtype (torch.dtype, optional): Dtype of arithmetic and result, as autocast chooses it. Default: that of
            ``x``.

    Returns:
        Tensor: (B, H', W', C_out) in ``out_dtype``, contiguous on a GPU; H' = (H + 2 padding - k) // stride + 1.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or ``out_dtype`` no floating-point dtype.
        ValueError: If shapes do not agree, or devices, or something is empty or out of range.
    """
    dtype = _check('conv2d_channel_last', x, weight, bias, out_dtype)
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
    if _on_gpu(x, weight, bias):
        missing = FULL_CHANNELS - int(x.shape[-1])
        if missing > 0 and x.element_size() == 2 and weight.requires_grad and torch.is_grad_enabled():
            # on an H200, 128 images of 224 x 224 to 48 channels: 0.16 ms instead of 0.37
            x, weight = F.pad(x, (0, missing)), F.pad(weight, (0, 0, 0, 0, 0, missing))
        return library.conv2d_channel_last(x.contiguous(), weight, bias, stride, padding)
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(dtype), bias, stride, padding)
    return y.permute(0, 2, 3, 1).to(dtype)


def _check(op: str, x, weight, bias, out_dtype) -> torch.dtype:
    """Check what both ops ask for; returns the dtype of the result."""
    for name, value, dims, first in (('x', x, 'B, H, W, C', 1), ('weight', weight, 'C_out, C_in, k, k', 0)):
        check_float(op, name, value, dims)
        if value.dim() != 4:
            raise ValueError(f'{op}: {name} must have the dimensions ({dims}), got shape {tuple(value.shape)}')
        if any(size == 0 for size in value.shape[first:]):
            raise ValueError(f'{op}: {name} has an empty dimension, got shape {tuple(value.shape)} for ({dims})')
    if bias is not None:
        check_float(op, 'bias', bias, 'C_out')
        check_shape(op, 'bias', bias, (weight.shape[0],), 'an element an output channel')
    check_same_device(op, 'x', dict(x=x, weight=weight, bias=bias))
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f'{op}: out_dtype is {dtype_name(out_dtype)}, expected a floating-point dtype')
    return x.dtype if out_dtype is None else out_dtype


def _on_gpu(x, weight, bias) -> bool:
    return (
        x.is_cuda
        and all(dtype_name(value.dtype) in KERNEL_DTYPES for value in (x, weight, bias) if value is not None)
        and x.numel() > 0
        and _has_kernel()
    )


@torch._dynamo.assume_constant_result
def _has_kernel() -> bool:
    return has_cuda_kernel('depthwise_conv_silu')

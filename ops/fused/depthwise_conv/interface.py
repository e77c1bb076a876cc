"""The depthwise convolution of channel-last maps with SiLU in one kernel; torch's layers for what it does not take."""

from typing import Optional

import torch

from ...backend import takes_kernel
from ...checks import check_shape
from ..checks import check_convolution, has_kernel_dtypes
from . import naive, registration  # noqa: F401 (which defines the op)


def depthwise_conv_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
    backend: Optional[str] = None,
) -> torch.Tensor:
    """Convolve each channel of a map by itself, stride 1, and apply SiLU, z * sigmoid(z).

    Weights of 3x3 run in one kernel (CUDA: with a multiple of 4 channels), whose arithmetic is float32, weights
    included, and which keeps no intermediate map for backward.  Everything else is torch's convolution and SiLU.

    Args:
        x (Tensor): (B, H, W, C), floating point; of its dimensions B may be 0.
        weight (Tensor): (C, 1, k, k), k odd; the map is padded by k // 2 zeros.
        bias (Tensor, optional): (C,). Default: None.
        out_dtype (torch.dtype, optional): Dtype of the result, to which ``x`` is rounded first, as autocast does.
            Default: that of ``x``.
        backend (str, optional): ``naive``, which is torch alone, ``cpu`` or ``cuda``; see :mod:`mmvmamba.ops.backend`.

    Returns:
        Tensor: (B, H, W, C) in ``out_dtype``.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or ``out_dtype`` no floating-point dtype.
        ValueError: If shapes do not agree, or devices, or something is empty or out of range.
        BackendError: If the backend asked for can't run, or its kernels don't take these arguments.
    """
    dtype = check_convolution('depthwise_conv_silu', x, weight, bias, out_dtype)
    channels, kernel = x.shape[-1], weight.shape[-1]
    check_shape('depthwise_conv_silu', 'weight', weight, (channels, 1, kernel, kernel), 'one kernel a channel of x')
    if kernel % 2 == 0:
        raise ValueError(f'depthwise_conv_silu: weight has kernels of {kernel}x{kernel}, expected an odd size')
    x = x.to(dtype)
    if takes_kernel('depthwise_conv_silu', backend, _fits, x, weight, bias):
        bias = None if bias is None else bias.float()
        return torch.ops.mmvmamba.depthwise_conv_silu(x.contiguous(), weight.float(), bias)
    return naive.depthwise_conv_silu(x, weight, bias)


def _fits(x, weight, bias) -> bool:
    return (
        weight.shape[-1] == 3
        and (x.is_cpu or x.shape[-1] % 4 == 0)
        and has_kernel_dtypes(x, weight, bias)
        and x.numel() > 0
    )

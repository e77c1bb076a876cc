"""The causal depthwise convolution along time, forward and backward beside autograd."""

from typing import Optional

import torch
import torch.nn.functional as F

from mmvmamba.ops.checks import check_float, check_same_device, check_shape, check_tensor


def forward(x, weight, bias, silu, initial_states=None) -> torch.Tensor:
    """Convolve each channel with its own kernel, which sees the present step and those before.

    Args:
        x (Tensor): (batch, dim, L).
        weight (Tensor): (dim, width).
        bias (Tensor, optional): (dim,).
        silu (bool): Whether to apply SiLU.
        initial_states (Tensor, optional): The width - 1 steps before the first, (batch, dim, width - 1).
            Default: zeros.

    Returns:
        Tensor: (batch, dim, L) in the dtype of ``x``; the arithmetic is float32 at least.

    Note:
        Differentiable by autograd.
    """
    wide = _wide(x)
    with torch.autocast(x.device.type, enabled=False):
        y = _convolve(_padded(x, weight, initial_states, wide), weight, bias, wide)
        return (F.silu(y) if silu else y).to(x.dtype)


def backward(x, weight, bias, dout, silu, initial_states=None, dfinal_states=None) -> tuple:
    """Gradients of :func:`forward`, without autograd.

    Args:
        x, weight, bias, silu, initial_states: As in :func:`forward`.
        dout (Tensor): Gradient of the output, (batch, dim, L).
        dfinal_states (Tensor, optional): Gradient of the last width - 1 steps of ``x``. Default: None.

    Returns:
        tuple[Tensor | None]: Gradients of ``x``, ``weight``, ``bias`` (None without) and ``initial_states``, which
        stand for zeros where they are None; all float32 at least.
    """
    wide = _wide(x)
    width, dim = weight.shape[1], x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        padded, gradient = _padded(x, weight, initial_states, wide), dout.to(wide)
        if silu:
            y = _convolve(padded, weight, bias, wide)
            sigmoid = torch.sigmoid(y)
            gradient = gradient * sigmoid * (1 + y * (1 - sigmoid))
        kernel = weight.to(wide).unsqueeze(1)
        dpadded, dweight, dbias = torch.ops.aten.convolution_backward(
            gradient.contiguous(), padded, kernel, [dim], [1], [0], [1], False, [0], dim, [True, True, bias is not None]
        )
    if dfinal_states is not None:
        dpadded[..., dpadded.shape[2] - (width - 1) :] += dfinal_states.to(wide)
    return dpadded[..., width - 1 :], dweight.squeeze(1), dbias, dpadded[..., : width - 1]


def last_steps(x: torch.Tensor, width: int, initial_states: Optional[torch.Tensor] = None) -> torch.Tensor:
    """The last width - 1 steps of ``x`` (batch, dim, L) with those before it."""
    before = x.new_zeros((*x.shape[:2], width - 1)) if initial_states is None else initial_states.to(x.dtype)
    return torch.cat((before, x), dim=2)[..., x.shape[2] :]


def check(name, x, weight, bias, initial_states=None, dout=None) -> None:
    """Check the arguments of a convolution.

    Raises:
        TypeError: If an argument is no floating-point tensor.
        ValueError: If a shape or a device is wrong.
    """
    check_tensor(name, 'x', x, 'batch, dim, L')
    check_tensor(name, 'weight', weight, 'dim, width')
    batch, dim, _ = x.shape
    width = weight.shape[1]
    check_shape(name, 'weight', weight, (dim, width), 'dim of x, width')
    tensors = dict(x=x, weight=weight)
    for key, value, shape, why in (
        ('bias', bias, (dim,), 'dim of x'),
        ('initial_states', initial_states, (batch, dim, width - 1), 'batch and dim of x, width - 1'),
        ('dout', dout, x.shape, 'the shape of x'),
    ):
        if value is not None:
            check_float(name, key, value, ', '.join(map(str, shape)))
            check_shape(name, key, value, shape, why)
            tensors[key] = value
    check_same_device(name, 'x', tensors)


def refuse_seq_idx(name, seq_idx) -> None:
    """Refuse sequences of several parts."""
    if seq_idx is not None:
        raise NotImplementedError(
            f'{name}: seq_idx, which parts a sequence, has no stand-in; call it for each part, or install the original '
            'causal-conv1d'
        )


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def _padded(x, weight, initial_states, wide):
    steps = weight.shape[1] - 1
    if initial_states is None:
        return F.pad(x.to(wide), (steps, 0))
    return torch.cat((initial_states.to(wide), x.to(wide)), dim=2)


def _convolve(padded, weight, bias, wide):
    bias = None if bias is None else bias.to(wide)
    return F.conv1d(padded, weight.to(wide).unsqueeze(1), bias, groups=weight.shape[0])

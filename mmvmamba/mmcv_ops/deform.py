"""Deformable convolutions by torchvision: each kernel element reads the map at a learned offset.

Shapes, for all: input (N, C, H, W), weight (O, C / group, kH, kW), offset (N, deformable_group * kH * kW * 2, h, w) as
y and x of each element, mask the like without the 2, output (N, O, h, w).  Of the scratch buffers that mmcv hands over,
only the first is used.
"""

import weakref

import torch

from .plain import plain, widen


def _forward(input, weight, offset, mask, bias, geometry):
    tensors = [widen(value) for value in (input, weight, offset, mask, bias)]
    return torch.ops.torchvision.deform_conv2d(*tensors, *geometry, mask.numel() > 0)


def _backward(grad, input, weight, offset, mask, bias, geometry) -> tuple:
    """Gradients of input, weight, offset, mask and bias."""
    tensors = [widen(value) for value in (grad, input, weight, offset, mask, bias)]
    return torch.ops.torchvision._deform_conv2d_backward(*tensors, *geometry, mask.numel() > 0)


def _no_mask_no_bias(input, weight) -> tuple[torch.Tensor, torch.Tensor]:
    return input.new_zeros(input.shape[0], 0), input.new_zeros(weight.shape[0])


@plain
def deform_conv_forward(
    input, weight, offset, output, columns, ones,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, im2col_step: int,
) -> None:  # fmt: skip
    """Deformable convolution without a mask, into ``output``."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(_forward(input, weight, offset, *_no_mask_no_bias(input, weight), geometry))


@plain
def deform_conv_backward_input(
    input, offset, gradOutput, gradInput, gradOffset, weight, columns,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, im2col_step: int,
) -> None:  # fmt: skip
    """Gradients of input and offset, into their buffers.

    The weight's comes with them; it waits at ``columns``, which mmcv hands to both functions of one backward.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _backward(gradOutput, input, weight, offset, *_no_mask_no_bias(input, weight), geometry)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])
    columns.waiting = weakref.ref(gradOutput), grads[1]


@plain
def deform_conv_backward_parameters(
    input, offset, gradOutput, gradWeight, columns, ones,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, scale: float, im2col_step: int,
) -> None:  # fmt: skip
    """Gradient of the weight, times ``scale``, added to its buffer."""
    owner, grad = columns.__dict__.pop('waiting', (lambda: None, None))
    if owner() is not gradOutput:
        geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
        weight = torch.zeros_like(gradWeight)
        grad = _backward(gradOutput, input, weight, offset, *_no_mask_no_bias(input, weight), geometry)[1]
    gradWeight.add_(grad.to(gradWeight.dtype), alpha=scale)


@plain
def modulated_deform_conv_forward(
    input, weight, bias, ones, offset, mask, output, columns,
    kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
    dilation_h: int, dilation_w: int, group: int, deformable_group: int, with_bias: bool,
) -> None:  # fmt: skip
    """Deformable convolution in which a mask weighs each element that is read, into ``output``."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    bias = bias if with_bias else weight.new_zeros(weight.shape[0])
    output.copy_(_forward(input, weight, offset, mask, bias, geometry))


@plain
def modulated_deform_conv_backward(
    input, weight, bias, ones, offset, mask, columns,
    grad_input, grad_weight, grad_bias, grad_offset, grad_mask, grad_output,
    kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
    dilation_h: int, dilation_w: int, group: int, deformable_group: int, with_bias: bool,
) -> None:  # fmt: skip
    """All gradients, into their buffers; the bias's only ``with_bias``."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    bias = bias if with_bias else weight.new_zeros(weight.shape[0])
    grads = _backward(grad_output, input, weight, offset, mask, bias, geometry)
    buffers = (grad_input, grad_weight, grad_offset, grad_mask) + (grad_bias,) * with_bias
    for buffer, grad in zip(buffers, grads):
        buffer.copy_(grad)

"""Registration of the convolutions with ``torch.library``: schemas and fake kernels.

The kernels and the autograd formulas, in ``csrc/cuda``, register themselves when the compiled extension is loaded.
"""

import torch

_library = torch.library.Library('mmvmamba', 'FRAGMENT')
for _schema in (
    'depthwise_conv_silu(Tensor x, Tensor weight, Tensor? bias) -> Tensor',
    'depthwise_conv_silu_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor, Tensor)',
    'conv2d_channel_last(Tensor x, Tensor weight, Tensor? bias, int stride, int padding) -> Tensor',
    'conv2d_channel_last_backward(Tensor dy, Tensor x, Tensor weight, int stride, int padding, bool x_grad, '
    'bool bias_grad) -> (Tensor, Tensor, Tensor)',
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


depthwise_conv_silu = torch.ops.mmvmamba.depthwise_conv_silu
conv2d_channel_last = torch.ops.mmvmamba.conv2d_channel_last


@torch.library.register_fake('mmvmamba::depthwise_conv_silu', lib=_library)
def _(x, weight, bias):
    return x.new_empty(x.shape)


@torch.library.register_fake('mmvmamba::depthwise_conv_silu_backward', lib=_library)
def _(dy, x, weight, bias):
    channels = x.shape[-1] if bias is not None else 0
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty((channels,))


@torch.library.register_fake('mmvmamba::conv2d_channel_last', lib=_library)
def _(x, weight, bias, stride, padding):
    batch, height, width, _ = x.shape
    out_channels, _, *kernel = weight.shape
    out_height, out_width = ((n + 2 * padding - k) // stride + 1 for n, k in zip((height, width), kernel))
    return x.new_empty((batch, out_height, out_width, out_channels))


@torch.library.register_fake('mmvmamba::conv2d_channel_last_backward', lib=_library)
def _(dy, x, weight, stride, padding, x_grad, bias_grad):
    dx = x.new_empty(x.shape if x_grad else (0,))
    db = dy.new_empty((weight.shape[0] if bias_grad else 0,), dtype=torch.float32)
    return dx, weight.new_empty(weight.shape), db

"""The op ``mmvmamba::depthwise_conv_silu``: fake kernels."""

from ...registration import define


def _fake(x, weight, bias):
    return x.new_empty(x.shape)


def _fake_backward(dy, x, weight, bias):
    channels = x.shape[-1] if bias is not None else 0
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty((channels,))


define(__file__, ('naive', 'cpu', 'cuda'), depthwise_conv_silu=_fake, depthwise_conv_silu_backward=_fake_backward)

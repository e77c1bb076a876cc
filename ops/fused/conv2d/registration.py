"""The op ``mmvmamba::conv2d_channel_last``: fake kernels."""

import torch

from ...registration import define


def _fake(x, weight, bias, stride, padding):
    batch, height, width, _ = x.shape
    out_channels, _, *kernel = weight.shape
    out_height, out_width = ((n + 2 * padding - k) // stride + 1 for n, k in zip((height, width), kernel))
    return x.new_empty((batch, out_height, out_width, out_channels))


def _fake_backward(dy, x, weight, stride, padding, x_grad, bias_grad):
    dx = x.new_empty(x.shape if x_grad else (0,))
    db = dy.new_empty((weight.shape[0] if bias_grad else 0,), dtype=torch.float32)
    return dx, weight.new_empty(weight.shape), db


define(__file__, ('naive', 'cpu', 'cuda'), conv2d_channel_last=_fake, conv2d_channel_last_backward=_fake_backward)

"""The ops ``mmvmamba::layer_norm`` and ``add_layer_norm``: fake kernels.

They return mean and deviation of every row too, which backward reads; the sum and the normalised map of
``add_layer_norm`` have the dtypes of ``x`` and of ``branch``.
"""

import torch

from ...registration import define

OUTPUT_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # of an output_type; kOutputTypes of common/dtypes.h


def _like(x, dtype=None):
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _statistics(x, weight, training):
    return weight.new_empty((x.numel() // x.shape[-1] if training else 0, 2))


def _fake(x, shift, weight, bias, eps, output_type, gelu, training):
    return _like(x, OUTPUT_TYPES[output_type]), _statistics(x, weight, training)


def _fake_backward(dy, x, shift, weight, bias, statistics, gelu):
    dshift = weight.new_empty(weight.shape if shift is not None else (0,))
    return _like(x), dshift, _like(weight), _like(weight)


def _fake_add(x, branch, factors, weight, bias, eps, training):
    return _like(x), _like(branch), _statistics(x, weight, training)


def _fake_add_backward(dsum, dy, sum, factors, weight, statistics):
    return _like(sum), _like(dy), _like(weight), _like(weight)


define(
    __file__,
    ('naive', 'cpu', 'cuda'),
    layer_norm=_fake,
    layer_norm_backward=_fake_backward,
    add_layer_norm=_fake_add,
    add_layer_norm_backward=_fake_add_backward,
)

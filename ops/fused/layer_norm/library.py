"""Registration of the layer normalisation with ``torch.library``: schemas and fake kernels.

The kernels and autograd formulas register themselves for CUDA when the compiled extension is loaded (``csrc/cuda``).
"""

import torch

_library = torch.library.Library('mmvmamba', 'FRAGMENT')


def _define(schema: str) -> None:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


_define(
    'layer_norm(Tensor x, Tensor? shift, Tensor weight, Tensor bias, float eps, ScalarType out_dtype, bool gelu, '
    'bool training) -> (Tensor, Tensor)'
)
_define(
    'layer_norm_backward(Tensor dy, Tensor x, Tensor? shift, Tensor weight, Tensor bias, Tensor statistics, bool gelu) '
    '-> (Tensor, Tensor, Tensor, Tensor)'
)
_define(
    'add_layer_norm(Tensor x, Tensor branch, Tensor? factors, Tensor weight, Tensor bias, float eps, '
    'ScalarType out_dtype, bool training) -> (Tensor, Tensor, Tensor)'
)
_define(
    'add_layer_norm_backward(Tensor dsum, Tensor dy, Tensor sum, Tensor? factors, Tensor weight, Tensor statistics) '
    '-> (Tensor, Tensor, Tensor, Tensor)'
)

layer_norm = torch.ops.mmvmamba.layer_norm
add_layer_norm = torch.ops.mmvmamba.add_layer_norm


def _like(x, dtype=None):
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _statistics(x, weight, training):
    return weight.new_empty((x.numel() // x.shape[-1] if training else 0, 2))


@torch.library.register_fake('mmvmamba::layer_norm', lib=_library)
def _(x, shift, weight, bias, eps, out_dtype, gelu, training):
    return _like(x, out_dtype), _statistics(x, weight, training)


@torch.library.register_fake('mmvmamba::layer_norm_backward', lib=_library)
def _(dy, x, shift, weight, bias, statistics, gelu):
    dshift = weight.new_empty(weight.shape if shift is not None else (0,))
    return _like(x), dshift, _like(weight), _like(weight)


@torch.library.register_fake('mmvmamba::add_layer_norm', lib=_library)
def _(x, branch, factors, weight, bias, eps, out_dtype, training):
    return _like(x), _like(x, out_dtype), _statistics(x, weight, training)


@torch.library.register_fake('mmvmamba::add_layer_norm_backward', lib=_library)
def _(dsum, dy, sum, factors, weight, statistics):
    return _like(sum), _like(dy), _like(weight), _like(weight)

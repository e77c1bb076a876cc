"""Registration of the layer normalisation with ``torch.library``: schema and fake kernels.

The kernels and the autograd formula register themselves for CUDA when the compiled extension is loaded (``csrc/cuda``).
"""

import torch

_library = torch.library.Library('mmvmamba', 'FRAGMENT')
_library.define(
    'layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType out_dtype, bool training) '
    '-> (Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    'layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor statistics) -> (Tensor, Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag,),
)


layer_norm = torch.ops.mmvmamba.layer_norm


@torch.library.register_fake('mmvmamba::layer_norm', lib=_library)
def _(x, weight, bias, eps, out_dtype, training):
    rows = x.numel() // x.shape[-1]
    return torch.empty_like(x, dtype=out_dtype), weight.new_empty((rows if training else 0, 2))


@torch.library.register_fake('mmvmamba::layer_norm_backward', lib=_library)
def _(dy, x, weight, statistics):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)

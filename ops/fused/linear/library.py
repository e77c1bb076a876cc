"""Registration of the linear layers with ``torch.library``: schemas and fake kernels.

The kernels and the autograd formula register themselves for CUDA when the compiled extension is loaded (``csrc/cuda``).
"""

import torch

_TAGS = (torch.Tag.pt2_compliant_tag,)
_library = torch.library.Library('mmvmamba', 'FRAGMENT')
_library.define('linear(Tensor x, Tensor weight, bool training) -> (Tensor, Tensor)', tags=_TAGS)
_library.define('linear_backward(Tensor dy, Tensor x, Tensor narrow) -> (Tensor, Tensor)', tags=_TAGS)
_library.define(
    'mlp(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, bool training) -> (Tensor, Tensor)',
    tags=_TAGS,
)
_library.define(
    'mlp_backward(Tensor dy, Tensor x, Tensor hidden, Tensor weight1, Tensor weight2) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    tags=_TAGS,
)

linear = torch.ops.mmvmamba.linear
mlp = torch.ops.mmvmamba.mlp


@torch.library.register_fake('mmvmamba::linear', lib=_library)
def _(x, weight, training):
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty(weight.shape if training else (0,))


@torch.library.register_fake('mmvmamba::linear_backward', lib=_library)
def _(dy, x, narrow):
    return x.new_empty(x.shape), narrow.new_empty(narrow.shape, dtype=torch.float32)


@torch.library.register_fake('mmvmamba::mlp', lib=_library)
def _(x, weight1, bias1, weight2, bias2, training):
    hidden = x.new_empty((*x.shape[:-1], weight1.shape[0]) if training else (0,))
    return x.new_empty((*x.shape[:-1], weight2.shape[0])), hidden


@torch.library.register_fake('mmvmamba::mlp_backward', lib=_library)
def _(dy, x, hidden, weight1, weight2):
    return (
        x.new_empty(x.shape),
        weight1.new_empty(weight1.shape),
        weight1.new_empty(weight1.shape[:1]),
        weight2.new_empty(weight2.shape),
        weight2.new_empty(weight2.shape[:1]),
    )

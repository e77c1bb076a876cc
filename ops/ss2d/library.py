"""Registration of the fused SS2D core with ``torch.library``: the schema and fake kernels of one opaque node.

``mmvmamba::ss2d_scan`` returns the merged map and what its backward wants: the maps (dt, B, C of every pixel and route)
and the state entering each segment of pixels.  Their layouts belong to the kernels, which own both directions.  The
kernels and the autograd formula register themselves for CUDA when the compiled extension is loaded (``csrc/cuda``).
"""

import torch

SEGMENT = 16  # pixels between two saved states: kSegment of csrc/cuda/ss2d_kernels.h
FUSED_RANKS = ((6, 8), (12, 16))  # ranks projected inside the scan kernel, and columns of their maps

_library = torch.library.Library('mmvmamba', 'FRAGMENT')
_PARAMETERS = 'Tensor x, Tensor x_proj_weight, Tensor dt_projs_weight, Tensor dt_projs_bias, Tensor A_logs, Tensor Ds, '


def map_columns(dt_rank):
    """Columns of the maps of one route: dt, B, C and padding."""
    for rank, columns in FUSED_RANKS:
        if dt_rank <= rank:
            return columns
    return (dt_rank + 2 + 7) // 8 * 8


def ss2d_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode, out_dtype, training):
    """The fused core, N = 1; arguments as in :func:`mmvmamba.ops.ss2d_scan`.

    Args:
        training (bool): Whether to keep the states that backward needs.

    Returns:
        Tensor: Merged map (B, D, H, W) with channels_last strides.
    """
    parameters = (t.float().contiguous() for t in (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds))
    return torch.ops.mmvmamba.ss2d_scan(x, *parameters, scan_mode, out_dtype, training)[0]


_library.define(
    f'ss2d_scan({_PARAMETERS}str scan_mode, ScalarType out_dtype, bool training) -> (Tensor, Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f'ss2d_scan_backward(Tensor dy, {_PARAMETERS}Tensor maps, Tensor states, str scan_mode) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _empty_map(x, dtype):
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


@torch.library.register_fake('mmvmamba::ss2d_scan', lib=_library)
def _(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode, out_dtype, training):
    batch, channels, height, width = x.shape
    length = height * width
    maps = x.new_empty((batch * length, 4 * map_columns(dt_projs_weight.shape[2])))
    states = A_logs.new_empty((batch * ((length + SEGMENT - 1) // SEGMENT) * 4 * channels if training else 0,))
    return _empty_map(x, out_dtype), maps, states


@torch.library.register_fake('mmvmamba::ss2d_scan_backward', lib=_library)
def _(dy, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, maps, states, scan_mode):
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    return (_empty_map(x, x.dtype), *(t.new_empty(t.shape) for t in parameters))

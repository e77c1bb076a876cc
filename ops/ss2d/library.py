"""Registration of the fused SS2D core with ``torch.library``: the schema and fake kernels of one opaque node.

``mmvmamba::ss2d_scan`` returns the merged map and what its backward wants: the maps (dt, B, C of every pixel and route)
and the state entering each segment of pixels.  Their layouts belong to the kernels of a device, which own both
directions.  Kernels and autograd formulas register themselves when the compiled extension is loaded (``csrc/cpu``,
``csrc/cuda``).
"""

import torch

SEGMENT = 16  # pixels between two saved states: kSegment of csrc/cuda/ss2d_kernels.h
TRITON_SEGMENT = 7  # likewise of the Triton kernels; divides the sides of the maps of an image of 224 x 224
CPU_SEGMENT = 32  # kSteps of csrc/cpu/ss2d_tile.h
CPU_LANES = 8  # channels of a saved state are padded to a multiple: kLanes there
FUSED_RANKS = ((6, 8), (12, 16))  # dt ranks with kernels of their own, and columns of their maps

_library = torch.library.Library('mmvmamba', 'FRAGMENT')
_PARAMETERS = 'Tensor x, Tensor x_proj_weight, Tensor dt_projs_weight, Tensor dt_projs_bias, Tensor A_logs, Tensor Ds, '


def map_columns(dt_rank):
    """Columns of the maps of one route: dt, B, C and padding."""
    for rank, columns in FUSED_RANKS:
        if dt_rank <= rank:
            return columns
    return (dt_rank + 2 + 15) // 16 * 16


def ss2d_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode, out_dtype, training):
    """The fused core, N = 1 on a GPU; arguments as in :func:`mmvmamba.ops.ss2d_scan`.

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
    maps, states = _saved_shapes(x, dt_projs_weight.shape[2], A_logs.shape[1])
    maps = x.new_empty(maps, dtype=torch.float32 if x.device.type == 'cpu' else x.dtype)
    return _empty_map(x, out_dtype), maps, A_logs.new_empty((states if training else 0,))


def _saved_shapes(x, dt_rank, d_state):
    """Shape of the maps, and number of elements of the states."""
    batch, channels, height, width = x.shape
    length = height * width
    if x.device.type == 'cpu':
        padded = (channels + CPU_LANES - 1) // CPU_LANES * CPU_LANES
        segments = (length + CPU_SEGMENT - 1) // CPU_SEGMENT
        return (batch * length, 4 * (dt_rank + 2 * d_state)), batch * 4 * segments * d_state * padded
    segments = (length + SEGMENT - 1) // SEGMENT
    return (batch * length, 4 * map_columns(dt_rank)), batch * segments * 4 * channels


@torch.library.register_fake('mmvmamba::ss2d_scan_backward', lib=_library)
def _(dy, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, maps, states, scan_mode):
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    return (_empty_map(x, x.dtype), *(t.new_empty(t.shape) for t in parameters))

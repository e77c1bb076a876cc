"""The op ``mmvmamba::ss2d_scan``, the fused SS2D core, and its Triton form.

It returns the merged map and what its backward wants: the projections (dt, B, C of every pixel and route) and the state
entering each segment of pixels.  Their layouts belong to the kernels of a device, which own both directions.
"""

import functools
import importlib.metadata
import re

import torch

from ..backend import logger
from ..cross_scan.registration import SCAN_MODES
from ..registration import CONSTANTS, check_absent, define, define_triton
from .tiling import tiling_of

OLDEST_TRITON = (3, 3)  # tuples of tensors in a kernel
TRITON_RANKS, TRITON_COLUMNS = (6, 12), (8, 16, 16)  # as columns_of wants them


def columns_of(dt_rank, ranks, columns):
    """Columns of the projections of one route: dt, B, C and padding.

    Args:
        dt_rank (int): Rank of dt.
        ranks (Sequence[int]): Ranks up to which there are kernels of their own.
        columns (Sequence[int]): Their columns; and last the number that other ranks' are a multiple of.
    """
    for rank, own in zip(ranks, columns):
        if dt_rank <= rank:
            return own
    step = columns[-1]
    return (dt_rank + 2 + step - 1) // step * step


def map_columns(dt_rank, d_state=1):
    """Columns of the projections of one route in the Triton kernels."""
    if d_state > 1:
        return map_dt_columns(dt_rank, d_state) + (2 * d_state + 7) // 8 * 8
    return columns_of(dt_rank, TRITON_RANKS, TRITON_COLUMNS)


def map_dt_columns(dt_rank, d_state):
    """Of these columns, those that are multiplied with the weights of dt."""
    return (dt_rank + 7) // 8 * 8 if d_state > 1 else map_columns(dt_rank)


def saved_by_triton(batch, length, channels, d_state):
    """Elements of the states that the Triton kernels save: entering segments, or for N > 1 blocks of a chain."""
    tiling = tiling_of(d_state)
    if d_state == 1:
        return batch * tiling.segments(length) * 4 * channels
    chain = tiling.chain(length)
    return batch * chain * 4 * d_state * channels if chain > 1 else 0


def cuda_columns(dt_rank, d_state=1):
    """Columns of the projections of one route in the CUDA kernels."""
    if d_state > 1:
        dt_step, step = CONSTANTS['ss2d_scan.cuda.states.columns']
        dt_columns = (dt_rank + dt_step - 1) // dt_step * dt_step
        return (dt_columns + 2 * cuda_states(d_state) + step - 1) // step * step
    return columns_of(dt_rank, CONSTANTS['ss2d_scan.cuda.ranks'], CONSTANTS['ss2d_scan.cuda.columns'])


def cuda_states(d_state):
    """States of a channel as the CUDA kernels for several of them pad them."""
    return min(number for number in CONSTANTS['ss2d_scan.cuda.states.numbers'] if number >= d_state)


def cuda_padded(channels):
    """Channels as the CUDA kernels pad them."""
    (lanes,) = CONSTANTS['ss2d_scan.cuda.lanes']
    return (channels + lanes - 1) // lanes * lanes


def _find_unsupported() -> str:
    """Why the fused kernels can't be compiled by the installed Triton, or nothing."""
    for name in ('triton', 'pytorch-triton', 'triton-windows'):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        oldest = '.'.join(map(str, OLDEST_TRITON))
        older = tuple(int(n) for n in re.findall(r'\d+', version)[:2]) < OLDEST_TRITON
        return f'triton is {version}, and the fused kernels need {oldest} or newer' if older else ''
    return ''


UNSUPPORTED = _find_unsupported()  # found once: torch.compile takes it as a constant


def _empty_map(x, dtype):
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


def _fake(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode, float_output, training, z=None):
    batch, channels, height, width = x.shape
    length, dt_rank, d_state = height * width, dt_projs_weight.shape[2], A_logs.shape[1]
    if x.device.type == 'cuda':
        (segment,) = CONSTANTS['ss2d_scan.cuda.states.segment' if d_state > 1 else 'ss2d_scan.cuda.segment']
        projections = x.new_empty((batch * length, 4 * cuda_columns(dt_rank, d_state)))
        values = cuda_padded(channels) * cuda_states(d_state) if d_state > 1 else channels
        states = batch * ((length + segment - 1) // segment) * 4 * values
    else:
        (segment,), (lanes,) = CONSTANTS['ss2d_scan.cpu.segment'], CONSTANTS['ss2d_scan.cpu.lanes']
        projections = x.new_empty((batch * length, 4 * (dt_rank + 2 * d_state)), dtype=torch.float32)
        padded = (channels + lanes - 1) // lanes * lanes
        states = batch * 4 * ((length + segment - 1) // segment) * d_state * padded
    y = _empty_map(x, torch.float32 if float_output else x.dtype)
    return y, projections, A_logs.new_empty((states if training else 0,))


def _fake_triton(
    x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode, float_output, training, z=None
):
    batch, channels, height, width = x.shape
    length, d_state = height * width, A_logs.shape[1]
    projections = x.new_empty((batch * length, 4 * map_columns(dt_projs_weight.shape[2], d_state)))
    states = saved_by_triton(batch, length, channels, d_state) if training else 0
    y = _empty_map(x, torch.float32 if float_output else x.dtype)
    return y, projections, A_logs.new_empty((states,))


def _fake_backward(
    dy, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, projections, states, scan_mode
):  # fmt: skip
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    return (_empty_map(x, x.dtype), *(t.new_empty(t.shape) for t in parameters))


# ---- Triton ---------------------------------------------------------------------------------------------------------
@functools.cache
def _announce_compilation():
    logger.info(
        'ss2d_scan on triton compiles its kernels at first use, up to a minute for each number of channels; later '
        "processes find them in Triton's cache"
    )


def _run(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode, float_output, training, z=None):
    from . import triton

    check_absent('ss2d_scan', z=z)
    _announce_compilation()
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    out_dtype = torch.float32 if float_output else x.dtype
    return triton.ss2d_scan(x, *parameters, SCAN_MODES[scan_mode], out_dtype, training)


def _run_backward(*arguments):
    from . import triton

    *tensors, scan_mode = arguments
    return triton.ss2d_scan_backward(*tensors, SCAN_MODES[scan_mode])


def _save(ctx, arguments, results):
    _, projections, states = results
    ctx.mark_non_differentiable(projections, states)
    ctx.save_for_backward(*arguments[:6], projections, states)
    ctx.scan_mode = arguments[6]


def _differentiate(ctx, dy, *_):
    return torch.ops.mmvmamba.ss2d_scan_triton_backward(dy, *ctx.saved_tensors, ctx.scan_mode)


define(__file__, ('naive', 'cpu', 'triton', 'cuda'), ss2d_scan=_fake, ss2d_scan_backward=_fake_backward)
define_triton(
    __file__,
    'ss2d_scan',
    run=_run,
    fake=_fake_triton,
    save=_save,
    differentiate=_differentiate,
    run_backward=_run_backward,
    fake_backward=_fake_backward,
)

"""Registration of the fused Triton core with ``torch.library``: one opaque node, forward and backward.

``mmvmamba::ss2d_scan_triton`` returns what ``mmvmamba::ss2d_scan`` does, with its own segments.  Importable without
Triton, which is loaded by the first call.
"""

import functools
import importlib.metadata
import re

import torch

from ..backend import logger
from .library import TRITON_SEGMENT, map_columns

OLDEST_TRITON = (3, 3)  # tuples of tensors in a kernel
_PARAMETERS = 'Tensor x, Tensor x_proj_weight, Tensor dt_projs_weight, Tensor dt_projs_bias, Tensor A_logs, Tensor Ds, '

_library = torch.library.Library('mmvmamba', 'FRAGMENT')


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


def ss2d_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode, out_dtype, training):
    """The fused core; arguments as in :func:`mmvmamba.ops.ss2d.library.ss2d_scan`."""
    parameters = (t.float().contiguous() for t in (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds))
    return torch.ops.mmvmamba.ss2d_scan_triton(x, *parameters, scan_mode, out_dtype, training)[0]


@functools.cache
def _announce_compilation():
    logger.info(
        'ss2d_scan on triton compiles its kernels at first use, up to a minute for each number of channels; later '
        "processes find them in Triton's cache"
    )


def _forward(*arguments):
    from .triton import ss2d_scan

    _announce_compilation()
    return ss2d_scan(*arguments)


def _backward(*arguments):
    from .triton import ss2d_scan_backward

    return ss2d_scan_backward(*arguments)


_library.define(
    f'ss2d_scan_triton({_PARAMETERS}str scan_mode, ScalarType out_dtype, bool training) -> (Tensor, Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f'ss2d_scan_triton_backward(Tensor dy, {_PARAMETERS}Tensor maps, Tensor states, str scan_mode) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ('CPU', 'CUDA'):  # on CPU by Triton's interpreter alone
    _library.impl('ss2d_scan_triton', _forward, _key)
    _library.impl('ss2d_scan_triton_backward', _backward, _key)


def _empty_map(x, dtype):
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


@torch.library.register_fake('mmvmamba::ss2d_scan_triton', lib=_library)
def _(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode, out_dtype, training):
    batch, channels, height, width = x.shape
    length = height * width
    maps = x.new_empty((batch * length, 4 * map_columns(dt_projs_weight.shape[2])))
    segments = (length + TRITON_SEGMENT - 1) // TRITON_SEGMENT
    states = A_logs.new_empty((batch * segments * 4 * channels if training else 0,))
    return _empty_map(x, out_dtype), maps, states


@torch.library.register_fake('mmvmamba::ss2d_scan_triton_backward', lib=_library)
def _(dy, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, maps, states, scan_mode):
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    return (_empty_map(x, x.dtype), *(t.new_empty(t.shape) for t in parameters))


def _setup(ctx, inputs, output):
    *tensors, ctx.scan_mode, _, _ = inputs
    _, maps, states = output
    ctx.mark_non_differentiable(maps, states)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, maps, states)


def _gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 9
    gradients = torch.ops.mmvmamba.ss2d_scan_triton_backward(dy, *ctx.saved_tensors, ctx.scan_mode)
    return (*gradients, None, None, None)


def _refuse_second_gradient(ctx, *_):
    raise RuntimeError("ss2d_scan: second derivatives are not compiled; backend='naive' has them, being plain PyTorch")


torch.library.register_autograd('mmvmamba::ss2d_scan_triton', _gradients, setup_context=_setup, lib=_library)
torch.library.register_autograd('mmvmamba::ss2d_scan_triton_backward', _refuse_second_gradient, lib=_library)

"""Registration of the compiled ops with ``torch.library``: schemas, fake kernels, autograd, autocast.

Importable without a compiler: a schema exists whether or not a backend can run.  ``backend`` is a resolved name
(``cpu``, ``triton`` or ``cuda``); the naive backend is plain PyTorch and needs none of this.
"""

import torch

from .checks import promote, state_dtype

# Steps between two saved states. A backend recomputes a chunk's states in backward.
CHUNK = {'cpu': 64, 'triton': 256, 'cuda': 256}
SCAN_MODE_INDEX = {'cross2d': 0, 'unidi': 1, 'bidi': 2, 'cascade2d': 3}

_library = torch.library.Library('mmvmamba', 'DEF')


def _define(schema: str, kernel, autocast=None) -> None:
    """Define an op with one kernel for CPU and CUDA (the ``backend`` argument tells them apart)."""
    name = schema.split('(')[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ('CPU', 'CUDA'):
        _library.impl(name, kernel, key)
    if autocast is not None:
        for key in ('AutocastCPU', 'AutocastCUDA'):
            _library.impl(name, autocast, key)


def _kernel(name: str, backend: str):
    """The function that runs an op: a raw C++ entry point or the Triton launcher of the same name."""
    if backend == 'triton':
        from .cross_scan import triton as cross_scan_triton
        from .selective_scan import triton as selective_scan_triton

        return getattr(selective_scan_triton if 'selective' in name else cross_scan_triton, name)
    return getattr(torch.ops.mmvmamba_C, f'{name}_{backend}')


def num_carries(length, backend: str):
    """Number of saved states along a scan of ``length`` steps: before each chunk, and the last one.

    At least 2, so that tracing with dynamic sizes need not ask whether it is 1.
    """
    return (length + CHUNK[backend] - 1) // CHUNK[backend] + 1


# ---- selective_scan -------------------------------------------------------------------------------------------------
def _selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype, backend):
    return _kernel('selective_scan_fwd', backend)(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype)


def _selective_scan_backward(dout, u, delta, A, B, C, D, delta_bias, carries, delta_softplus, backend):
    return _kernel('selective_scan_bwd', backend)(dout, u, delta, A, B, C, D, delta_bias, carries, delta_softplus)


def _selective_scan_autocast(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype, backend):
    u, delta, B, C = promote((u, delta, B, C))
    dtype = state_dtype(u.dtype)
    A, D, delta_bias = (None if t is None else t.to(dtype) for t in (A, D, delta_bias))
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype, backend)


_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)

_define(
    'selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, '
    'bool delta_softplus, ScalarType out_dtype, str backend) -> (Tensor, Tensor)',
    _selective_scan,
    _selective_scan_autocast,
)
_define(
    'selective_scan_backward(Tensor dout, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, '
    'Tensor? delta_bias, Tensor carries, bool delta_softplus, str backend) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    _selective_scan_backward,
)

selective_scan = torch.ops.mmvmamba.selective_scan


@torch.library.register_fake('mmvmamba::selective_scan', lib=_library)
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype, backend):
    batch, dim, length = u.shape
    return (
        u.new_empty((batch, dim, length), dtype=out_dtype),
        A.new_empty((batch, dim, num_carries(length, backend), A.shape[1])),
    )


@torch.library.register_fake('mmvmamba::selective_scan_backward', lib=_library)
def _(dout, u, delta, A, B, C, D, delta_bias, carries, delta_softplus, backend):
    dim = u.shape[1]
    grads = [t.new_empty(t.shape) for t in (u, delta, A, B, C)]
    return (*grads, A.new_empty((0 if D is None else dim,)), A.new_empty((0 if delta_bias is None else dim,)))


def _selective_scan_setup(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _, ctx.backend = inputs
    carries = output[1]
    ctx.mark_non_differentiable(carries)
    ctx.save_for_backward(*tensors, carries)


def _selective_scan_grad(ctx, dout, _):
    u, delta, A, B, C, D, delta_bias, carries = ctx.saved_tensors
    du, ddelta, dA, dB, dC, dD, dbias = torch.ops.mmvmamba.selective_scan_backward(
        dout, u, delta, A, B, C, D, delta_bias, carries, ctx.delta_softplus, ctx.backend
    )
    return (du, ddelta, dA, dB, dC, None if D is None else dD, None if delta_bias is None else dbias, None, None, None)


def _refuse_second_gradient(ctx, *_):
    raise RuntimeError(
        "selective_scan: second derivatives are not compiled; backend='naive' has them, being plain PyTorch"
    )


torch.library.register_autograd(
    'mmvmamba::selective_scan', _selective_scan_grad, setup_context=_selective_scan_setup, lib=_library
)
torch.library.register_autograd('mmvmamba::selective_scan_backward', _refuse_second_gradient, lib=_library)


# ---- cross_scan and cross_merge -------------------------------------------------------------------------------------
def _cross_scan(x, scan_mode, channel_last, backend):
    return _kernel('cross_scan', backend)(x, SCAN_MODE_INDEX[scan_mode], channel_last)


def _cross_merge(y, height, width, scan_mode, channel_last, backend):
    return _kernel('cross_merge', backend)(y, height, width, SCAN_MODE_INDEX[scan_mode], channel_last)


_define('cross_scan(Tensor x, str scan_mode, bool channel_last, str backend) -> Tensor', _cross_scan)
_define(
    'cross_merge(Tensor y, SymInt height, SymInt width, str scan_mode, bool channel_last, str backend) -> Tensor',
    _cross_merge,
)

cross_scan = torch.ops.mmvmamba.cross_scan
cross_merge = torch.ops.mmvmamba.cross_merge


@torch.library.register_fake('mmvmamba::cross_scan', lib=_library)
def _(x, scan_mode, channel_last, backend):
    if channel_last:
        batch, height, width, channels = x.shape
        return x.new_empty((batch, height * width, 4, channels))
    batch, channels, height, width = x.shape
    return x.new_empty((batch, 4, channels, height * width))


@torch.library.register_fake('mmvmamba::cross_merge', lib=_library)
def _(y, height, width, scan_mode, channel_last, backend):
    if channel_last:
        return y.new_empty((y.shape[0], height, width, y.shape[3]))
    return y.new_empty((y.shape[0], y.shape[2], height, width))


def _cross_scan_setup(ctx, inputs, output):
    x, ctx.scan_mode, ctx.channel_last, ctx.backend = inputs
    ctx.size = x.shape[1:3] if ctx.channel_last else x.shape[2:4]


def _cross_scan_grad(ctx, dy):
    return cross_merge(dy, *ctx.size, ctx.scan_mode, ctx.channel_last, ctx.backend), None, None, None


def _cross_merge_setup(ctx, inputs, output):
    _, _, _, ctx.scan_mode, ctx.channel_last, ctx.backend = inputs


def _cross_merge_grad(ctx, dx):
    return cross_scan(dx, ctx.scan_mode, ctx.channel_last, ctx.backend), None, None, None, None, None


torch.library.register_autograd('mmvmamba::cross_scan', _cross_scan_grad, setup_context=_cross_scan_setup, lib=_library)
torch.library.register_autograd(
    'mmvmamba::cross_merge', _cross_merge_grad, setup_context=_cross_merge_setup, lib=_library
)

"""The op ``mmvmamba::ssd_scan``: fake kernels, the kernels for the CPU, and its Triton form with autograd.

``height``, ``width`` and ``scan_mode``, a place in SCAN_MODES, belong to the pixels of a map; for plain sequences they
are 0, 0 and -1.  Forward keeps nothing: backward makes the states between chunks again, which are larger than x.
"""

import functools

import torch

from ..backend import logger
from ..checks import promote, state_dtype
from ..cross_scan.registration import SCAN_MODES
from ..registration import define, define_kernels, define_triton
from . import chunked, routes

MAX_CHANNELS, MAX_STATE = 64, 128  # P and N whose state a Triton program holds


def _fake(x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus, float_output, keep_state, height, width, scan_mode):
    out = x.new_empty(x.shape, dtype=torch.float32 if float_output else x.dtype)
    shape = (x.shape[0], A.shape[0], x.shape[3], B.shape[3]) if keep_state else (0,)
    return out, A.new_empty(shape)


def _fake_backward(
    dout, dlast_state, x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus, height, width, scan_mode
):  # fmt: skip
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state)
    return tuple(A.new_empty(0) if value is None else value.new_empty(value.shape) for value in inputs)


# ---- matrix products of torch ---------------------------------------------------------------------------------------
# On a CPU image by image: what a larger batch keeps between two products leaves the caches, and the allocator's pool.
def _images(x, *tensors):
    """The tensors of each image of a batch, on a GPU those of all; what is None stays so."""
    step = 1 if x.device.type == 'cpu' else x.shape[0]
    for first in range(0, x.shape[0], step):
        yield [None if t is None else t[first : first + step] for t in (x, *tensors)]


def _run_products(
    x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus, float_output, keep_state, height, width, scan_mode
):  # fmt: skip
    route, dtype = ((height, width), SCAN_MODES[scan_mode]), torch.float32 if float_output else x.dtype
    outs, lasts = [], []
    for x, dt, B, C, first in _images(x, dt, B, C, initial_state):  # noqa: B020
        if scan_mode >= 0:
            x, dt, B, C = routes.scan_inputs(x, dt, B, C, *route)
        out, last = chunked.ssd_scan(x, dt, A, B, C, D, dt_bias, first, dt_softplus)
        outs.append((routes.merge(out, *route) if scan_mode >= 0 else out).to(dtype))
        lasts.append(last)
    return torch.cat(outs).contiguous(), torch.cat(lasts).contiguous() if keep_state else A.new_empty(0)


def _run_products_backward(
    dout, dlast_state, x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus, height, width, scan_mode
):  # fmt: skip
    inputs, route = (x, dt, A, B, C, D, dt_bias, initial_state), ((height, width), SCAN_MODES[scan_mode])
    parts = []
    for x, dt, B, C, first, dy, dlast in _images(x, dt, B, C, initial_state, dout, dlast_state):  # noqa: B020
        if scan_mode >= 0:
            x, dt, B, C = routes.scan_inputs(x, dt, B, C, *route)
            dy = None if dy is None else routes.scan_pixels(dy.unsqueeze(2).expand(-1, -1, 4, -1, -1), *route)
            dy = None if dy is None else dy.flatten(2, 3)
        grads = chunked.ssd_scan_backward(dy, dlast, x, dt, A, B, C, D, dt_bias, first, dt_softplus)
        if scan_mode >= 0:
            dx, ddt, dA, dB, dC, *others = grads
            ddt = routes.restore_pixels(ddt.unflatten(2, (4, -1)), *route).flatten(2, 3)
            dB, dC = (routes.restore_pixels(value, *route) for value in (dB, dC))
            grads = (routes.merge(dx, *route), ddt, dA, dB, dC, *others)
        parts.append(grads)
    results = []
    for place, (value, grads) in enumerate(zip(inputs, zip(*parts))):
        if value is None:
            results.append(A.new_empty(0))
        else:  # A, D and dt_bias are those of all images
            grad = torch.stack(grads).sum(0) if place in (2, 5, 6) else torch.cat(grads)
            results.append(grad.to(value.dtype).contiguous())
    return tuple(results)


# ---- Triton ---------------------------------------------------------------------------------------------------------
@functools.cache
def _announce_products(channels: int, d_state: int) -> None:
    logger.info(
        f"ssd_scan on triton runs as torch's matrix products for {channels} channels a head and {d_state} states: the "
        f'kernels hold {MAX_CHANNELS} and {MAX_STATE}'
    )


def _choose(x, B, kernel: str, products):
    """The Triton kernel, or for a state that no program can hold the products."""
    channels, d_state = x.shape[3], B.shape[3]
    if channels > MAX_CHANNELS or d_state > MAX_STATE:
        _announce_products(channels, d_state)
        return products
    from . import triton

    return getattr(triton, kernel)


def _run(x, dt, A, B, *others):
    return _choose(x, B, 'ssd_scan', _run_products)(x, dt, A, B, *others)


def _run_backward(dout, dlast_state, x, dt, A, B, *others):
    run = _choose(x, B, 'ssd_scan_backward', _run_products_backward)
    return run(dout, dlast_state, x, dt, A, B, *others)


def _save(ctx, arguments, _):
    ctx.save_for_backward(*arguments[:8])
    ctx.dt_softplus, _, ctx.keep_state, *ctx.route = arguments[8:]


def _differentiate(ctx, dout, dlast_state):
    tensors = ctx.saved_tensors
    grads = torch.ops.mmvmamba.ssd_scan_triton_backward(
        dout, dlast_state if ctx.keep_state else None, *tensors, ctx.dt_softplus, *ctx.route
    )
    return tuple(None if tensor is None else grad for tensor, grad in zip(tensors, grads))


def _autocast(x, dt, A, B, C, D, dt_bias, initial_state, *others):
    x, dt, B, C = promote((x, dt, B, C))
    A, *weights = (None if t is None else t.to(state_dtype(x.dtype)) for t in (A, D, dt_bias, initial_state))
    return (x, dt, A, B, C, *weights, *others)


define(__file__, ('naive', 'cpu', 'triton'), ssd_scan=_fake, ssd_scan_backward=_fake_backward)
define_kernels('CPU', ssd_scan=_run_products, ssd_scan_backward=_run_products_backward)
define_triton(
    __file__,
    'ssd_scan',
    run=_run,
    fake=_fake,
    save=_save,
    differentiate=_differentiate,
    run_backward=_run_backward,
    fake_backward=_fake_backward,
    autocast=_autocast,
)

"""The op ``mmvmamba::selective_scan`` and its Triton form: fake kernels, and what Triton's needs of autograd.

``states`` holds the state before each chunk of steps, from which backward recomputes the others, and the last one.
"""

import torch

from ..checks import promote, state_dtype
from ..registration import CONSTANTS, check_absent, define, define_triton

TRITON_CHUNK = 256  # steps between two saved states of the Triton kernels


def num_states(length, device_type: str, triton: bool = False):
    """Number of saved states along a scan of ``length`` steps: before each chunk, and the last one.

    At least 2, so that tracing with dynamic sizes need not ask whether it is 1.
    """
    chunk = TRITON_CHUNK
    if not triton:
        (chunk,) = CONSTANTS[f'selective_scan.{"cuda" if device_type == "cuda" else "cpu"}.chunk']
    return (length + chunk - 1) // chunk + 1


def _fake(u, delta, A, B, C, D, delta_bias, delta_softplus, float_output, z=None, initial_state=None, triton=False):
    batch, dim, length = u.shape
    return (
        u.new_empty((batch, dim, length), dtype=torch.float32 if float_output else u.dtype),
        A.new_empty((batch, dim, num_states(length, u.device.type, triton), A.shape[1])),
    )


def _fake_triton(*arguments):
    return _fake(*arguments, triton=True)


def _fake_backward(dout, u, delta, A, B, C, D, delta_bias, states, delta_softplus):
    dim = u.shape[1]
    grads = [t.new_empty(t.shape) for t in (u, delta, A, B, C)]
    return (*grads, A.new_empty((0 if D is None else dim,)), A.new_empty((0 if delta_bias is None else dim,)))


# ---- Triton ---------------------------------------------------------------------------------------------------------
def _run(u, delta, A, B, C, D, delta_bias, delta_softplus, float_output, z=None, initial_state=None):
    from . import triton

    check_absent('selective_scan', z=z, initial_state=initial_state)
    if delta.shape[1] != u.shape[1]:
        raise NotImplementedError(
            f'selective_scan: delta has {delta.shape[1]} channels for {u.shape[1]} of u; channels that share one are '
            'not implemented yet'
        )
    out_dtype = torch.float32 if float_output else u.dtype
    return triton.selective_scan_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype)


def _run_backward(dout, u, delta, A, B, C, D, delta_bias, states, delta_softplus):
    from . import triton

    return triton.selective_scan_bwd(dout, u, delta, A, B, C, D, delta_bias, states, delta_softplus)


def _save(ctx, arguments, results):
    states = results[1]
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(*arguments[:7], states)
    ctx.delta_softplus = arguments[7]


def _differentiate(ctx, dout, _):
    *inputs, D, delta_bias, states = ctx.saved_tensors
    *grads, dD, dbias = torch.ops.mmvmamba.selective_scan_triton_backward(
        dout, *inputs, D, delta_bias, states, ctx.delta_softplus
    )
    return (*grads, None if D is None else dD, None if delta_bias is None else dbias)


def _autocast(u, delta, A, B, C, D, delta_bias, *others):
    u, delta, B, C = promote((u, delta, B, C))
    A, D, delta_bias = (None if t is None else t.to(state_dtype(u.dtype)) for t in (A, D, delta_bias))
    return (u, delta, A, B, C, D, delta_bias, *others)


define(__file__, ('naive', 'cpu', 'triton', 'cuda'), selective_scan=_fake, selective_scan_backward=_fake_backward)
define_triton(
    __file__,
    'selective_scan',
    run=_run,
    fake=_fake_triton,
    save=_save,
    differentiate=_differentiate,
    run_backward=_run_backward,
    fake_backward=_fake_backward,
    autocast=_autocast,
)

"""Forward and backward of a scan whose output are its states, as functions of tensors beside autograd."""

import torch

from mmvmamba.ops.selective_scan import forms

from .carries import pack
from .scan import as_kernels_take, carries, check_gradient, in_form_of, output_dtype, run, run_backward


def forward(name, u, delta, A, B, D, delta_bias, delta_softplus, float_output) -> list:
    """Scan without C and without a record of autograd's.

    Arguments as in :func:`mmvmamba.compat.scan.forward`; D is ignored.

    Returns:
        list[Tensor]: States (batch, dim, N, L), and ``x``.
    """
    with torch.no_grad():
        given = u
        u, delta, B, _ = as_kernels_take(name, u, delta, A, B, B, D, delta_bias)
        dtype = output_dtype(given, float_output)
        groups, d_state = B.shape[1:3]
        u_, delta_, A_, B_, C_, bias_ = forms.one_state_each(u, delta, A, B, delta_bias)
        out, states = run(u_, delta_, A_, B_, C_, None, bias_, delta_softplus, float_output)
        out = forms.states_of(out, groups, d_state).contiguous()
        states = forms.states_of(states, groups, d_state).squeeze(4).transpose(2, 3).contiguous()
        return [out if out.dtype == dtype else out.to(dtype), pack(states, u.shape[2])]


def backward(name, dout, u, delta, A, B, D, delta_bias, x, delta_softplus) -> list:
    """Gradients of :func:`forward` by the op's own backward.

    Args:
        name (str): The provided module, for errors.
        dout (Tensor): Gradient of the states, (batch, dim, N, L).
        x (Tensor, optional): What forward returned; None computes it again.
        others: As in :func:`forward`.

    Returns:
        list[Tensor | None]: Gradients of u, delta, A, B, D and delta_bias; that of D is zero.
    """
    given = u, delta, B
    u, delta, B, _ = as_kernels_take(name, u, delta, A, B, B, D, delta_bias)
    groups, d_state = B.shape[1:3]
    dout = check_gradient(name, dout, u, (*u.shape[:2], d_state, u.shape[2]))
    u_, delta_, A_, B_, C_, bias_ = forms.one_state_each(u, delta, A, B, delta_bias)
    states = carries(name, x, u, A)
    if states is not None:
        states = forms.channels_of(states.transpose(2, 3).unsqueeze(4), groups)
    dout = forms.channels_of(dout, groups)
    grads = run_backward(dout, u_, delta_, A_, B_, C_, None, bias_, states, delta_softplus)
    du, ddelta, dA, dB, _, _, dbias = grads
    du, ddelta = (forms.states_of(t, groups, d_state).sum(2) for t in (du, ddelta))
    dA = forms.states_of(dA[None], groups, d_state)[0].squeeze(2)
    dB = dB.squeeze(2).unflatten(1, (groups, d_state))
    if delta_bias is None:
        dbias = None
    else:
        dbias = forms.states_of(dbias[None], groups, d_state)[0].sum(1)
    du, ddelta, dB = map(in_form_of, (du, ddelta, dB), given, ('u', 'delta', 'B'))
    return [du, ddelta, dA, dB, None if D is None else torch.zeros_like(D), dbias]

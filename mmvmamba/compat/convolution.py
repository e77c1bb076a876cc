"""The Python functions of the package causal_conv1d."""

import torch

from mmvmamba.ops.checks import check_float, check_shape, check_tensor

from .conv import check, forward, last_steps, refuse_seq_idx


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """Causal depthwise convolution along time.

    Args:
        x (Tensor): (batch, dim, L).
        weight (Tensor): (dim, width).
        bias (Tensor, optional): (dim,). Default: None.
        seq_idx (None): Refused otherwise.
        initial_states (Tensor, optional): The width - 1 steps before the first, (batch, dim, width - 1).
            Default: zeros.
        return_final_states (bool): Whether to return the last width - 1 steps too. Default: False.
        final_states_out (Tensor, optional): Where to write them. Default: None.
        activation (str, optional): ``silu`` or ``swish``, which are the same. Default: None.

    Returns:
        Tensor | tuple[Tensor, Tensor]: The output (batch, dim, L), and if asked for the last steps.

    Raises:
        TypeError: If an argument is no floating-point tensor.
        ValueError: If a shape, a device or the activation is wrong.
        NotImplementedError: For ``seq_idx``.
    """
    refuse_seq_idx('causal_conv1d_fn', seq_idx)
    check('causal_conv1d_fn', x, weight, bias, initial_states)
    out = forward(x, weight, bias, _is_silu('causal_conv1d_fn', activation), initial_states)
    if not return_final_states:
        return out
    final = last_steps(x, weight.shape[1], initial_states)
    if final_states_out is not None:
        check_float('causal_conv1d_fn', 'final_states_out', final_states_out, 'batch, dim, width - 1')
        check_shape('causal_conv1d_fn', 'final_states_out', final_states_out, final.shape, 'batch, dim, width - 1')
        with torch.no_grad():
            final_states_out.copy_(final)
        final = final_states_out
    return out, final


def causal_conv1d_ref(
    x,
    weight,
    bias=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """:func:`causal_conv1d_fn` in the order of arguments of the reference."""
    return causal_conv1d_fn(
        x, weight, bias, None, initial_states, return_final_states, final_states_out, activation
    )  # fmt: skip


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):  # fmt: skip
    """Convolve the next steps of a sequence whose last ones are in ``conv_state``, which goes on with them.

    Args:
        x (Tensor): (batch, dim), or (batch, dim, steps).
        conv_state (Tensor): The last steps, width - 1 or more, (batch, dim, count); written in place.
        weight (Tensor): (dim, width).
        bias (Tensor, optional): (dim,). Default: None.
        activation (str, optional): ``silu`` or ``swish``. Default: None.
        cache_seqlens, conv_state_indices (None): Refused otherwise.

    Returns:
        Tensor: The output in the shape of ``x``.

    Raises:
        TypeError, ValueError, NotImplementedError: As in :func:`causal_conv1d_fn`.
    """
    name = 'causal_conv1d_update'
    for key, value in (('cache_seqlens', cache_seqlens), ('conv_state_indices', conv_state_indices)):
        if value is not None:
            raise NotImplementedError(f'{name}: {key} has no stand-in; install the original causal-conv1d')
    check_float(name, 'x', x, 'batch, dim, steps')
    steps = x.unsqueeze(2) if x.dim() == 2 else x
    check(name, steps, weight, bias)
    check_tensor(name, 'conv_state', conv_state, 'batch, dim, count')
    count = max(conv_state.shape[2], weight.shape[1] - 1)
    check_shape(name, 'conv_state', conv_state, (*steps.shape[:2], count), 'batch and dim of x, width - 1 or more')
    before = conv_state[..., conv_state.shape[2] - (weight.shape[1] - 1) :]
    out = forward(steps, weight, bias, _is_silu(name, activation), before)
    with torch.no_grad():
        conv_state.copy_(torch.cat((conv_state, steps.to(conv_state.dtype)), dim=2)[..., steps.shape[2] :])
    return out.squeeze(2) if x.dim() == 2 else out


def _is_silu(name, activation) -> bool:
    if activation not in (None, 'silu', 'swish'):
        raise ValueError(f'{name}: activation is {activation!r}, expected None, silu or swish')
    return activation is not None

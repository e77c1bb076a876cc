"""``causal_conv1d.cpp_functions``, the compiled module's functions as newer versions call them."""

from ..causal_conv1d_cuda import causal_conv1d_bwd, causal_conv1d_fwd


def causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation):
    """Convolve (batch, dim, L); ``final_states_out`` is written in place."""
    return causal_conv1d_fwd(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation)


def causal_conv1d_bwd_function(
    x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation
):  # fmt: skip
    """Gradients of x, weight, bias and, if asked for, of initial_states."""
    return causal_conv1d_bwd(
        x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation
    )  # fmt: skip


__all__ = ['causal_conv1d_bwd_function', 'causal_conv1d_fwd_function']

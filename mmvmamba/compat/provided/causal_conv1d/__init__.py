"""``causal_conv1d`` over torch's convolution."""

from ...convolution import causal_conv1d_fn, causal_conv1d_update

__version__ = '1.5.0+mmvmamba'

__all__ = ['causal_conv1d_fn', 'causal_conv1d_update']

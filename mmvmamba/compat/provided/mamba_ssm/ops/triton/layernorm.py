"""``mamba_ssm.ops.triton.layernorm``, as versions 1 name it."""

from .....norms import RMSNorm, layer_norm_fn, rms_norm_fn

__all__ = ['RMSNorm', 'layer_norm_fn', 'rms_norm_fn']

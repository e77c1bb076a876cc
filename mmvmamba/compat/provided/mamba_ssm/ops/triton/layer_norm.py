"""``mamba_ssm.ops.triton.layer_norm``, as versions 2 name it."""

from .....norms import RMSNorm, layer_norm_fn, rms_norm_fn

__all__ = ['RMSNorm', 'layer_norm_fn', 'rms_norm_fn']

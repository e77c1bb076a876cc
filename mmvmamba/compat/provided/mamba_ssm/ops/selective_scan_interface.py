"""``mamba_ssm.ops.selective_scan_interface``."""

from ....convolution import causal_conv1d_fn
from ....interface import (
    bimamba_inner_fn,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    original_name,
    selective_scan_fn,
    selective_scan_ref,
)

mamba_inner_ref = mamba_inner_fn
bimamba_inner_ref = bimamba_inner_fn
__getattr__ = original_name

__all__ = [
    'bimamba_inner_fn',
    'bimamba_inner_ref',
    'causal_conv1d_fn',
    'mamba_inner_fn',
    'mamba_inner_fn_no_out_proj',
    'mamba_inner_ref',
    'selective_scan_fn',
    'selective_scan_ref',
]

"""``mamba_ssm`` over mmvmamba's ops: what vision models use of it."""

from ...interface import bimamba_inner_fn, mamba_inner_fn, selective_scan_fn
from ...mamba import Mamba

# below 2.0.4, from which on callers expect Mamba-2
__version__ = '1.2.2+mmvmamba'

__all__ = ['Mamba', 'bimamba_inner_fn', 'mamba_inner_fn', 'selective_scan_fn']

"""``selective_scan``, the Python package of VMamba's code."""

from ...interface import vmamba_scan_fn, vmamba_scan_ref

selective_scan_fn, selective_scan_ref = vmamba_scan_fn, vmamba_scan_ref

__all__ = ['selective_scan_fn', 'selective_scan_ref']

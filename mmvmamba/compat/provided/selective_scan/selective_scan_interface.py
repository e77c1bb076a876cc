"""``selective_scan.selective_scan_interface``."""

from ...interface import vmamba_scan_fn, vmamba_scan_ref

selective_scan_fn, selective_scan_ref = vmamba_scan_fn, vmamba_scan_ref

__all__ = ['selective_scan_fn', 'selective_scan_ref']

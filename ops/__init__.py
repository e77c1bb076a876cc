"""Selective-scan operators shared by classification, detection and segmentation."""

from .backend import BackendError, BackendStatus, backend_report, use_backend
from .cross_scan.interface import SCAN_MODES, cross_merge, cross_scan
from .layer_norm.interface import layer_norm
from .selective_scan.interface import selective_scan
from .ss2d.interface import ss2d_scan

__all__ = [
    'SCAN_MODES',
    'BackendError',
    'BackendStatus',
    'backend_report',
    'cross_merge',
    'cross_scan',
    'layer_norm',
    'selective_scan',
    'ss2d_scan',
    'use_backend',
]

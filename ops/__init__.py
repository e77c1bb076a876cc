"""Selective-scan operators shared by classification, detection and segmentation."""

from .backend import BackendError, BackendStatus, backend_report, use_backend
from .cross_scan.interface import SCAN_MODES, cross_merge, cross_scan
from .flops import register_flops
from .fused.conv2d.interface import conv2d_channel_last
from .fused.depthwise_conv.interface import depthwise_conv_silu
from .fused.layer_norm.interface import add_layer_norm, layer_norm
from .fused.linear.interface import linear
from .fused.mlp.interface import mlp
from .selective_scan.interface import selective_scan
from .ss2d.interface import ss2d_scan
from .ssd_scan.interface import ssd_scan

register_flops()

__all__ = [
    'SCAN_MODES',
    'BackendError',
    'BackendStatus',
    'add_layer_norm',
    'backend_report',
    'conv2d_channel_last',
    'cross_merge',
    'cross_scan',
    'depthwise_conv_silu',
    'layer_norm',
    'linear',
    'mlp',
    'selective_scan',
    'ss2d_scan',
    'ssd_scan',
    'use_backend',
]

"""Building blocks of VMamba, one idea a file; they take and give maps (B, C, H, W), ``channels_last`` in memory."""

from .options import SS2DOptions
from .scan import intercept_scan, scan_routes
from .ss2d import SS2D
from .stage import Stage
from .vss_block import VSSBlock

__all__ = ['SS2D', 'SS2DOptions', 'Stage', 'VSSBlock', 'intercept_scan', 'scan_routes']

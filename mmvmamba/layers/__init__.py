"""Building blocks of VMamba, one idea a file; all of them work on channel-last maps (B, H, W, C)."""

from .options import SS2DOptions
from .scan import intercept_scan, scan_routes
from .ss2d import SS2D
from .vss_block import BlockSequence, VSSBlock

__all__ = ['SS2D', 'BlockSequence', 'SS2DOptions', 'VSSBlock', 'intercept_scan', 'scan_routes']

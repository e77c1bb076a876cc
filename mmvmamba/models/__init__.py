"""The backbone, under our own option names and under the published code's."""

from .upstream import MM_VSSM, MMDET_VSSM, MMSEG_VSSM, parse_forward_type
from .vssm import ARCHS, VSSMBackbone

__all__ = ['ARCHS', 'MMDET_VSSM', 'MMSEG_VSSM', 'MM_VSSM', 'VSSMBackbone', 'parse_forward_type']

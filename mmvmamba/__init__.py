"""VMamba for OpenMMLab: one backbone for mmpretrain, mmdet and mmsegmentation."""

from . import hooks  # noqa: F401  (registers them under plain names)
from .models import MM_VSSM, VSSMBackbone
from .runtime import setup_runtime
from .version import __version__

setup_runtime()

__all__ = ['MM_VSSM', 'VSSMBackbone', '__version__']

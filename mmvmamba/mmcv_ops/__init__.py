"""mmcv's ops without compiling mmcv: a stand-in for ``mmcv._ext`` over torchvision's and torch's own ops.

A compiled ``mmcv._ext`` always wins.  Where there is none, ``import mmvmamba`` lets ``mmcv.ops`` find the stand-in, and
``python -m mmvmamba.mmcv_ops place`` puts it into mmcv's folder, for commands that import ``mmcv.ops`` before anything
of ours.  ``MMVMAMBA_MMCV_OPS=off`` disables both.
"""

from .finder import install
from .placing import place, remove
from .state import State, state

__all__ = ['State', 'install', 'place', 'remove', 'state']

"""The names that projects with a copy of VMamba's or Mamba's code import, over mmvmamba's ops.

:func:`install`, or ``python -m mmvmamba.compat train.py ...`` for a script as it is, provides the compiled and Python
modules that are not installed.  :func:`fuse` replaces the core of copied SS2D layers by the fused one.
"""

from .fusing import fuse
from .table import format_table, install, table

__all__ = ['format_table', 'fuse', 'install', 'table']

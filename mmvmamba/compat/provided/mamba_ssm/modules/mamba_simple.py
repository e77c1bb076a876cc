"""``mamba_ssm.modules.mamba_simple``."""

from ....mamba import Mamba

__all__ = ['Mamba']

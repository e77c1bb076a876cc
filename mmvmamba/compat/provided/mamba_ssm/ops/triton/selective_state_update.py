"""``mamba_ssm.ops.triton.selective_state_update``, which is refused when it is called."""

from .....mamba import selective_state_update

__all__ = ['selective_state_update']

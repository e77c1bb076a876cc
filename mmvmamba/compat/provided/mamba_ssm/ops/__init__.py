"""``mamba_ssm.ops``."""

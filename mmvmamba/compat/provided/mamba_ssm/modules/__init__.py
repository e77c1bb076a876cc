"""``mamba_ssm.modules``."""

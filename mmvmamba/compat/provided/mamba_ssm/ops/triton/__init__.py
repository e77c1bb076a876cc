"""``mamba_ssm.ops.triton``, in plain PyTorch."""

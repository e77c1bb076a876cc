"""VMamba-B, s1l20: what the configs of all tasks share."""

vmamba = dict(
    arch='base-s1l20',
    channels=[128, 256, 512, 1024],
    num_features=1024,
    checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth',
)

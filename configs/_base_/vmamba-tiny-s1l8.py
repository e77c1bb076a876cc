"""VMamba-T, s1l8: what the configs of all tasks share."""

vmamba = dict(
    arch='tiny-s1l8',
    channels=[96, 192, 384, 768],
    num_features=768,
    checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth',
)

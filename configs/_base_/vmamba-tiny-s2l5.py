"""VMamba-T, s2l5: what the configs of all tasks share."""

vmamba = dict(
    arch='tiny-s2l5',
    channels=[96, 192, 384, 768],
    num_features=768,
    checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth',
)

"""VMamba-T, vanilla: what the configs of all tasks share."""

vmamba = dict(
    arch='tiny-v0',
    channels=[96, 192, 384, 768],
    num_features=768,
    checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth',
)

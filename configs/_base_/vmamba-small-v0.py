"""VMamba-S, vanilla: what the configs of all tasks share."""

vmamba = dict(
    arch='small-v0',
    channels=[96, 192, 384, 768],
    num_features=768,
    checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth',
)

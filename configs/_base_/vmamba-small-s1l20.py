"""VMamba-S, s1l20: what the configs of all tasks share."""

vmamba = dict(
    arch='small-s1l20',
    channels=[96, 192, 384, 768],
    num_features=768,
    checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth',
)

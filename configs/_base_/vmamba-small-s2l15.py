"""VMamba-S, s2l15: what the configs of all tasks share."""

vmamba = dict(
    arch='small-s2l15',
    channels=[96, 192, 384, 768],
    num_features=768,
    checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm_small_0229_ckpt_epoch_222.pth',
)

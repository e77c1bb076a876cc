"""VMamba-B, s2l15: what the configs of all tasks share."""

vmamba = dict(
    arch='base-s2l15',
    channels=[128, 256, 512, 1024],
    num_features=1024,
    checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm_base_0229_ckpt_epoch_237.pth',
)

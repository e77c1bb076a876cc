"""VMamba-B, vanilla: what the configs of all tasks share."""

vmamba = dict(
    arch='base-v0',
    channels=[128, 256, 512, 1024],
    num_features=1024,
    checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth',
    # what the published detectors and segmentors start from: drop path 0.5, no EMA
    earlier_checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%2320240218/vssmbase_dp05_ckpt_epoch_260.pth',
)

_base_ = [
    './_base_/upernet_vmamba_160k.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/vmamba-base-v0.py',
]

model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        arch=_base_.vmamba.arch, drop_path_rate=0.3, init_cfg=dict(checkpoint=_base_.vmamba.earlier_checkpoint)
    ),
    decode_head=dict(in_channels=_base_.vmamba.channels),
    auxiliary_head=dict(in_channels=_base_.vmamba.channels[2]),
)

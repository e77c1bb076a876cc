"""Masked pretraining on the demo's digits: `python tools/train.py` with this file takes a minute on a CPU."""

_base_ = '../demo/vmamba-nano_1xb64_digits-32px.py'

model = dict(
    _delete_=True,
    type='SimMIM',
    data_preprocessor=dict(type='SelfSupDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True),
    backbone=dict(type='mmvmamba.VSSMBackbone', arch='nano', out_indices=(3,), mask_token=True),
    neck=dict(type='SimMIMLinearDecoder', in_channels=256, encoder_stride=32),
    head=dict(type='SimMIMHead', patch_size=4, loss=dict(type='PixelReconstructionLoss', criterion='L1')),
)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='SimMIMMaskGenerator', input_size=32, mask_patch_size=8, model_patch_size=4, mask_ratio=0.5),
    dict(type='PackInputs'),
]
train_dataloader = dict(collate_fn=dict(type='default_collate'), dataset=dict(pipeline=pipeline))
val_dataloader = val_cfg = val_evaluator = test_dataloader = test_cfg = test_evaluator = None
default_hooks = dict(checkpoint=dict(save_best=None))

"""Swin's recipe for another 30 epochs at 384 pixels, from weights of 224; VMamba publishes none."""

_base_ = 'mmpretrain::swin_transformer/swin-base_16xb64_in1k-384px.py'

model = dict(backbone=dict(_delete_=True, type='mmvmamba.VSSMBackbone', out_indices=(3,)))
optim_wrapper = dict(optimizer=dict(lr=2e-5, weight_decay=1e-8))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=2e-7, by_epoch=True, begin=5, T_max=25, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=512)

"""The published ImageNet-1K recipe of VMamba: that of Swin on 8x128 images, with averaged weights."""

_base_ = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'

model = dict(backbone=dict(_delete_=True, type='mmvmamba.VSSMBackbone', out_indices=(3,)))
train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)
# keeps 0.9999 of the average at each iteration; the averaged weights are the ones evaluated
custom_hooks = [dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL')]

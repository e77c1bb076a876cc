"""The published ImageNet-1K recipe of VMamba: that of Swin on 8x128 images, with averaged weights."""

_base_ = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'

model = dict(backbone=dict(_delete_=True, type='mmvmamba.VSSMBackbone', out_indices=(3,)))
# one tensor a batch, in memory from which it is copied while the GPU works
train_dataloader = dict(
    batch_size=128,
    num_workers=12,
    collate_fn=dict(type='default_collate'),
    drop_last=True,
    pin_memory=True,
    persistent_workers=True,
)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)
# keeps 0.9999 of the average at each iteration; the averaged weights are the ones evaluated
custom_hooks = [
    dict(type='EMAHook', ema_type='mmvmamba.ForeachEMA', momentum=1e-4, priority='ABOVE_NORMAL'),
    dict(type='mmvmamba.PrefetchHook'),
]
# losses are read when the logger logs
default_hooks = dict(runtime_info=dict(type='mmvmamba.DeferredInfoHook'))

_base_ = './mask-rcnn_vmamba-s-s1l20_fpn_ms-crop-3x_coco.py'

optim_wrapper = dict(type='mmvmamba.FastOptimWrapper', dtype='float16', optimizer=dict(fused=True))
train_dataloader = dict(
    num_workers=8, pin_memory=True, collate_fn=dict(type='mmvmamba.pad_masks_collate', pad_size_divisor=32)
)
default_hooks = dict(runtime_info=dict(type='mmvmamba.DeferredInfoHook'))
custom_hooks = [dict(type='mmvmamba.PrefetchHook'), dict(type='mmvmamba.CompileHook', dynamic=True)]
model_wrapper_cfg = dict(broadcast_buffers=False, gradient_as_bucket_view=True)

_base_ = './vmamba-small-s2l15-in1k-pre_upernet_4xb4-160k_ade20k-896x896.py'

optim_wrapper = dict(type='mmvmamba.FastOptimWrapper', dtype='float16', optimizer=dict(fused=True))
train_dataloader = dict(num_workers=8, pin_memory=True)
default_hooks = dict(runtime_info=dict(type='mmvmamba.DeferredInfoHook'))
custom_hooks = [dict(type='mmvmamba.PrefetchHook'), dict(type='mmvmamba.CompileHook')]
model_wrapper_cfg = dict(broadcast_buffers=False, gradient_as_bucket_view=True)

_base_ = './vmamba-small-s2l15_8xb128_in1k.py'

optim_wrapper = dict(type='mmvmamba.FastOptimWrapper', dtype='float16', optimizer=dict(fused=True))
custom_hooks = [*_base_.custom_hooks, dict(type='mmvmamba.CompileHook', mode='reduce-overhead')]
data_preprocessor = dict(type='mmvmamba.BatchClsDataPreprocessor')
env_cfg = dict(cudnn_benchmark=True)
model_wrapper_cfg = dict(broadcast_buffers=False, gradient_as_bucket_view=True)

"""Fully sharded training: parameters, gradients and optimizer states are spread over the GPUs."""

_base_ = './vmamba-base-s1l20_8xb128-amp_in1k.py'

runner_type = 'FlexibleRunner'
strategy = dict(type='mmvmamba.FSDPStrategy')  # a unit of it is a block
# every shard is flat: what must not decay for being flat is named
# FastOptimWrapper would take the norm of a shard for that of the gradients
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    paramwise_cfg=dict(flat_decay_mult=None, custom_keys={'.Ds': dict(decay_mult=0.0)}),
)
# EMAHook copies a whole model, which a sharded one is not
custom_hooks = []
model_wrapper_cfg = None

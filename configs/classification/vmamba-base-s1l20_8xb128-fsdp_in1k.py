"""Fully sharded training: parameters, gradients and optimizer states are spread over the GPUs."""

_base_ = './vmamba-base-s1l20_8xb128-amp_in1k.py'

runner_type = 'FlexibleRunner'
strategy = dict(
    type='FSDPStrategy',
    model_wrapper=dict(
        auto_wrap_policy=dict(type='torch.distributed.fsdp.wrap.size_based_auto_wrap_policy', min_num_params=2_000_000),
        use_orig_params=True,
    ),
)
# EMAHook copies a whole model, which a sharded one is not
custom_hooks = []

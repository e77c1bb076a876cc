_base_ = './_base_/vmamba-tiny-s1l8.py'

model = dict(backbone=dict(ssm_conv=-1, posembed=True))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'pos_embed': dict(decay_mult=0.0)}))

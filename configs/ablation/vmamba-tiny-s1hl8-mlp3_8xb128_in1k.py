_base_ = './_base_/vmamba-tiny-s1l8.py'

model = dict(backbone=dict(ssm_ratio=1.5, mlp_ratio=3.0))

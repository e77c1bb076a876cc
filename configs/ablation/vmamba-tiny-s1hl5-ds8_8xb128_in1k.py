_base_ = './_base_/vmamba-tiny-s1l8.py'

model = dict(backbone=dict(depths=(2, 2, 5, 2), ssm_d_state=8, ssm_ratio=1.5))

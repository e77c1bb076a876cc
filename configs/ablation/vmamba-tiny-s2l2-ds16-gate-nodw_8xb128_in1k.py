_base_ = './_base_/vmamba-tiny-s1l8.py'

model = dict(backbone=dict(ssm_conv=-1, depths=(2, 2, 2, 2), ssm_d_state=16, ssm_ratio=2.0, forward_type='v05'))

_base_ = './_base_/vmamba-tiny-s1l8.py'

model = dict(backbone=dict(ssm_conv=-1, forward_type='v051d_noz'))

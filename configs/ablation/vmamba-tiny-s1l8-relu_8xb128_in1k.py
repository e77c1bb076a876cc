_base_ = './_base_/vmamba-tiny-s1l8.py'

model = dict(backbone=dict(ssm_act_layer='relu'))

_base_ = './_base_/vmamba-tiny-v0.py'

model = dict(backbone=dict(norm_layer='ln2d', forward_type='v05'))

_base_ = './_base_/vmamba-tiny-v0.py'

model = dict(backbone=dict(forward_type='v02'))

_base_ = './_base_/vmamba-tiny-s1l8.py'

model = dict(backbone=dict(forward_type='v05_onsoftmax_noz'))

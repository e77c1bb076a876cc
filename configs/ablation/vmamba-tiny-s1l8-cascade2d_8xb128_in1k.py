_base_ = './_base_/vmamba-tiny-s1l8.py'

model = dict(backbone=dict(forward_type='v052dc_noz'))

"""UperNet on an output stride of 16: the last stage keeps the resolution of the third."""

_base_ = '../segmentation/vmamba-tiny-s1l8-in1k-pre_upernet_4xb4-160k_ade20k-512x512.py'

model = dict(backbone=dict(strides=(1, 2, 2, 1)))

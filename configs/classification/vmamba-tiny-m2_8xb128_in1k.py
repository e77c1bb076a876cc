_base_ = ['./_base_/vmamba_8xb128_in1k.py', '../_base_/vmamba-tiny-m2.py']

model = dict(backbone=dict(arch=_base_.vmamba.arch), head=dict(in_channels=_base_.vmamba.num_features))

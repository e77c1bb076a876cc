_base_ = ['./_base_/upernet_convnext-small_160k.py', './_base_/ade20k_896x896.py']

model = dict(data_preprocessor=dict(size=_base_.crop_size))

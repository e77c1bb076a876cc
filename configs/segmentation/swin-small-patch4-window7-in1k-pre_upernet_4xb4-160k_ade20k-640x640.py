_base_ = ['./_base_/upernet_swin-small_160k.py', 'mmseg::_base_/datasets/ade20k_640x640.py']

model = dict(data_preprocessor=dict(size=_base_.crop_size))

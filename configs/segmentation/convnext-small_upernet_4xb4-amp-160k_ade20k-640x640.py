_base_ = ['./_base_/upernet_convnext-small_160k.py', 'mmseg::_base_/datasets/ade20k_640x640.py']

model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(426, 426)),
)

"""A ResNet-18 of the demo classifier's size at 64 pixels, to compare with."""

_base_ = './vmamba-nano_1xb64_digits-64px.py'

width = 24
model = dict(
    backbone=dict(_delete_=True, type='ResNet', depth=18, stem_channels=width, base_channels=width, out_indices=(3,)),
    head=dict(in_channels=8 * width),
)

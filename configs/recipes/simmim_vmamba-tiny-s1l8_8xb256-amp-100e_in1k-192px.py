"""Masked pretraining: SimMIM's recipe for Swin."""

_base_ = ['mmpretrain::simmim/simmim_swin-base-w6_8xb256-amp-coslr-100e_in1k-192px.py', '../_base_/vmamba-tiny-s1l8.py']

model = dict(
    backbone=dict(
        _delete_=True, type='mmvmamba.VSSMBackbone', arch=_base_.vmamba.arch, out_indices=(3,), mask_token=True
    ),
    neck=dict(in_channels=_base_.vmamba.num_features),
)

"""Layer-wise decay of the learning rate in mmsegmentation."""

_base_ = '../segmentation/vmamba-tiny-s1l8-in1k-pre_upernet_4xb4-160k_ade20k-512x512.py'

optim_wrapper = dict(constructor='mmvmamba.LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(layer_decay_rate=0.8))

"""Layer-wise decay of the learning rate in mmdet."""

_base_ = '../detection/mask-rcnn_vmamba-t-s1l8_fpn_1x_coco.py'

optim_wrapper = dict(constructor='mmvmamba.LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(layer_decay_rate=0.8))

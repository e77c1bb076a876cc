_base_ = './mask-rcnn_vmamba-b-v0_fpn_1x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')

_base_ = './mask-rcnn_vmamba-t-s1l8_fpn_1x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')

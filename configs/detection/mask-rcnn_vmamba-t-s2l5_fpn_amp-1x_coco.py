_base_ = './mask-rcnn_vmamba-t-s2l5_fpn_1x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')

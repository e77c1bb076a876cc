_base_ = './mask-rcnn_vmamba-s-s2l15_fpn_1x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')

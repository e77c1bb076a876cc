_base_ = './mask-rcnn_vmamba-s-s1l20_fpn_1x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')

_base_ = './mask-rcnn_vmamba-b-s1l20_fpn_1x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')

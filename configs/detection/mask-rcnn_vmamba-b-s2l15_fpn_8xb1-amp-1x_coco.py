_base_ = './mask-rcnn_vmamba-b-s2l15_fpn_8xb1-1x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')

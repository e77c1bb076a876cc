_base_ = './mask-rcnn_vmamba-t-s2l5_fpn_ms-crop-3x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')

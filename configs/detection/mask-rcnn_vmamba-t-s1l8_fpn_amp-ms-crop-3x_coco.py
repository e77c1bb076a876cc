_base_ = './mask-rcnn_vmamba-t-s1l8_fpn_ms-crop-3x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')

_base_ = './mask-rcnn_vmamba-s-s1l20_fpn_ms-crop-3x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')

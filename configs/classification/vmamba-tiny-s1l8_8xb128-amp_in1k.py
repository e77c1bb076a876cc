_base_ = './vmamba-tiny-s1l8_8xb128_in1k.py'

optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')

_base_ = './vmamba-tiny-s2l5_8xb128_in1k.py'

optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')

_base_ = './vmamba-base-v0_8xb128_in1k.py'

optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')

_base_ = './vmamba-base-s2l15-in1k-pre_upernet_4xb4-160k_ade20k-512x512.py'

optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')

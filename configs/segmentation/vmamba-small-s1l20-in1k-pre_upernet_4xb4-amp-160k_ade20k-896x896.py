_base_ = './vmamba-small-s1l20-in1k-pre_upernet_4xb4-160k_ade20k-896x896.py'

optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')

_base_ = ['./_base_/finetune_384px.py', '../_base_/vmamba-small-s2l15.py']

model = dict(backbone=dict(arch=_base_.vmamba.arch), head=dict(in_channels=_base_.vmamba.num_features))
load_from = _base_.vmamba.checkpoint  # the classifier's weights too

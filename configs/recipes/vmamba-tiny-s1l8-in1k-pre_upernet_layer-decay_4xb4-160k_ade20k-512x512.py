"""Layer-wise decay of the learning rate in mmsegmentation, and no weight decay for the scan's own parameters."""

_base_ = '../segmentation/vmamba-tiny-s1l8-in1k-pre_upernet_4xb4-160k_ade20k-512x512.py'

optim_wrapper = dict(
    constructor='mmvmamba.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        layer_decay_rate=0.8,
        # the longest key in a name wins: 'backbone' would beat 'A_logs', and does not beat these
        custom_keys={'.op.A_logs': dict(decay_mult=0.0), '.op.Ds': dict(decay_mult=0.0)},
    ),
)

"""The vanilla tiny model by its published options: what the ablations of the first design start from."""

_base_ = '../../classification/_base_/vmamba_8xb128_in1k.py'

model = dict(
    backbone=dict(
        type='mmvmamba.MM_VSSM',
        dims=96,
        depths=(2, 2, 9, 2),
        ssm_d_state=16,
        ssm_ratio=2.0,
        ssm_dt_rank='auto',
        ssm_act_layer='silu',
        ssm_conv=3,
        ssm_conv_bias=True,
        ssm_init='v0',
        forward_type='v0',
        mlp_ratio=0.0,
        norm_layer='ln',
        downsample_version='v1',
        patchembed_version='v1',
        posembed=False,
        drop_path_rate=0.2,
    ),
    head=dict(in_channels=768),
)

"""The tiny s1l8 model by its published options: what the ablations of the final design start from."""

_base_ = '../../classification/_base_/vmamba_8xb128_in1k.py'

model = dict(
    backbone=dict(
        type='mmvmamba.MM_VSSM',
        dims=96,
        depths=(2, 2, 8, 2),
        ssm_d_state=1,
        ssm_ratio=1.0,
        ssm_dt_rank='auto',
        ssm_act_layer='silu',
        ssm_conv=3,
        ssm_conv_bias=False,
        ssm_init='v0',
        forward_type='v05_noz',
        mlp_ratio=4.0,
        norm_layer='ln2d',
        downsample_version='v3',
        patchembed_version='v2',
        posembed=False,
        drop_path_rate=0.2,
    ),
    head=dict(in_channels=768),
)

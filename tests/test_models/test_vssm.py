"""VSSMBackbone: options, shapes, freezing, checkpointing, errors."""

import math

import pytest
import torch

from mmvmamba import VSSMBackbone
from mmvmamba.checkpoint import MisfitError
from mmvmamba.models import ARCHS

SMALL = dict(dims=16, depths=(1, 1, 1))


def small(**options):
    return VSSMBackbone(dict(SMALL, **options), out_indices=(0, 1, 2))


@pytest.mark.parametrize('arch', ARCHS)
def test_every_arch_builds(arch):
    with torch.device('meta'):
        model = VSSMBackbone(arch)
    assert len(model.layers) == 4 and model.num_features[0] in (32, 96, 128)


@pytest.mark.parametrize(
    'option, value',
    [
        ('scan_mode', 'unidi'),
        ('scan_mode', 'bidi'),
        ('scan_mode', 'cascade2d'),
        ('gate', 'silu'),
        ('gate', 'linear'),
        ('out_norm', 'none'),
        ('out_norm', 'dwconv3'),
        ('out_norm', 'cnorm'),
        ('out_norm', 'softmax'),
        ('out_norm', 'sigmoid'),
        ('out_act', True),
        ('force_fp32', True),
        ('stem', 'patch4'),
        ('downsample', 'merge'),
        ('downsample', 'conv2'),
        ('ssm_init', 'randn'),
        ('ssm_init', 'zeros'),
        ('norm_layer', 'ln'),
        ('norm_layer', 'bn'),
        ('mlp', 'gmlp'),
        ('mlp_ratio', 0.0),
        ('d_conv', 1),
        ('conv_bias', True),
        ('d_state', 4),
        ('ssm_ratio', 2.0),
        ('dt_rank', 3),
        ('act', 'gelu'),
        ('mlp_act', 'relu'),
        ('dropout', 0.1),
        ('mlp_dropout', 0.1),
        ('patch_size', 8),
        ('patch_norm', False),
        ('pos_embed', True),
        ('post_norm', True),
        ('ssm_ratio', 0),
        ('ssm_ratio', 0.5),
    ],
    ids=lambda value: str(value),
)
def test_every_option_trains(option, value):
    model = small(**{option: value}).train()
    outs = model(torch.randn(2, 3, 36, 44))
    sum(out.float().square().mean() for out in outs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_options_change_the_result():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    results = []
    for options in (
        {},
        dict(scan_mode='unidi'),
        dict(scan_mode='bidi'),
        dict(scan_mode='cascade2d'),
        dict(out_norm='softmax'),
        dict(out_act=True),
        dict(act='gelu'),
    ):
        torch.manual_seed(1)
        results.append(small(**options).eval()(x)[-1])
    for i, first in enumerate(results):
        for second in results[i + 1 :]:
            assert not torch.allclose(first, second)


def test_stages_of_one_resolution():
    model = VSSMBackbone(dict(dims=(16, 16), depths=(1, 1), downsample='none'), out_indices=(0, 1)).eval()
    assert [tuple(out.shape) for out in model(torch.randn(1, 3, 32, 20))] == [(1, 16, 8, 5)] * 2


@pytest.mark.parametrize('stem, patch_size, side', [('conv3x2', 8, 11), ('patch4', 8, 8), ('conv3x2', 2, 4)])
def test_the_smallest_image_of_a_stem(stem, patch_size, side):
    model = small(stem=stem, patch_size=patch_size).eval()
    assert model(torch.randn(1, 3, side, side))[0].isfinite().all()
    with pytest.raises(ValueError, match=f'at least one image of at least {side}x{side} pixels'):
        model(torch.randn(1, 3, side, side - 1))


def test_a_position_embedding_is_resized_at_load_and_at_run_time(monkeypatch):
    lines = []
    monkeypatch.setattr('mmvmamba.models.vssm.print_log', lambda text, **_: lines.append(text))
    small, large = (
        VSSMBackbone(dict(dims=16, depths=(1,), pos_embed=True, img_size=size), out_indices=(0,)).eval()
        for size in (32, 48)
    )
    large.load_state_dict(small.state_dict())
    assert lines == ['resized pos_embed from (8, 8) to (12, 12)']
    expected = torch.nn.functional.interpolate(small.pos_embed, (12, 12), mode='bicubic', align_corners=False)
    assert torch.equal(large.pos_embed, expected) and large.pos_embed.std() > 0
    x = torch.randn(1, 3, 48, 48)
    assert torch.equal(small(x)[0], large(x)[0])
    assert small(torch.randn(1, 3, 20, 52))[0].shape == (1, 16, 5, 13)


def test_a_position_embedding_is_resized_from_a_file(tmp_path):
    file = tmp_path / 'position.pth'
    arch = dict(dims=16, depths=(1,), pos_embed=True)
    first = VSSMBackbone(dict(arch, img_size=32), out_indices=(0,))
    torch.save(dict(model=first.state_dict()), file)
    second = VSSMBackbone(
        dict(arch, img_size=48),
        out_indices=(0,),
        frozen_stages=0,
        init_cfg=dict(type='Pretrained', checkpoint=str(file)),
    )
    second.init_weights()
    assert second.pos_embed.shape[2:] == (12, 12) and not second.pos_embed.requires_grad
    first.load_state_dict(second.state_dict())
    with pytest.raises(MisfitError, match='1 unexpected: pos_embed'):
        VSSMBackbone(dict(arch, pos_embed=False), out_indices=(0,), init_cfg=second.init_cfg).init_weights()


@pytest.mark.parametrize('size', [(4, 4), (5, 7), (33, 65), (37, 4), (4, 61), (96, 32)], ids=str)
@pytest.mark.parametrize('layers', [('conv3x2', 'conv3'), ('patch4', 'merge'), ('patch4', 'conv2')], ids=str)
def test_any_input_size(size, layers):
    model = small(stem=layers[0], downsample=layers[1]).eval()
    outs = model(torch.randn(1, 3, *size))
    assert [out.shape[1] for out in outs] == [16, 32, 64]
    assert all(out.isfinite().all() and min(out.shape) >= 1 for out in outs)
    if layers == ('conv3x2', 'conv3'):
        for i, out in enumerate(outs):
            assert tuple(out.shape[2:]) == tuple(math.ceil(math.ceil(side / 4) / 2**i) for side in size)


def test_out_indices_select_the_same_maps():
    x = torch.randn(1, 3, 64, 64)
    full = VSSMBackbone('nano').eval()
    part = VSSMBackbone('nano', out_indices=(1, 3)).eval()
    missing, unexpected = part.load_state_dict(full.state_dict(), strict=False)
    assert not missing and {name.split('.')[0] for name in unexpected} == {'outnorm0', 'outnorm2'}
    outs = full(x)
    for ours, expected in zip(part(x), (outs[1], outs[3])):
        assert torch.equal(ours, expected)


def test_channels_last_and_contiguous_images_agree():
    model, x = VSSMBackbone('nano').eval(), torch.randn(2, 3, 40, 48)
    for first, second in zip(model(x), model(x.to(memory_format=torch.channels_last))):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_maps_are_contiguous_for_mmcv_ops():
    from mmcv.ops import RoIAlign
    from torchvision.ops import roi_align

    maps = VSSMBackbone('nano').eval()(torch.randn(1, 3, 64, 64).to(memory_format=torch.channels_last))
    assert all(out.is_contiguous() for out in maps)
    rois = torch.tensor([[0.0, 3.0, 5.0, 40.0, 60.0]])
    expected = roi_align(maps[0], rois, 7, 0.25, aligned=True)
    torch.testing.assert_close(RoIAlign(7, 0.25)(maps[0], rois), expected)


def test_frozen_stages():
    model = VSSMBackbone('nano', frozen_stages=2).train()
    frozen = [model.patch_embed, model.layers[0], model.layers[1], model.outnorm0, model.outnorm1]
    assert all(not p.requires_grad for module in frozen for p in module.parameters())
    assert all(not module.training for part in frozen for module in part.modules())
    assert all(p.requires_grad for p in model.layers[2].parameters()) and model.layers[2].training
    sum(out.mean() for out in model(torch.randn(1, 3, 32, 32))).backward()
    assert all((p.grad is None) != p.requires_grad for p in model.parameters())


def test_norm_eval_keeps_running_statistics():
    for norm_eval in (False, True):
        model = VSSMBackbone(dict(SMALL, norm_layer='bn'), out_indices=(2,), norm_eval=norm_eval).train()
        before = {name: value.clone() for name, value in model.named_buffers()}
        model(torch.randn(2, 3, 32, 32))
        changed = any(not torch.equal(before[name], value) for name, value in model.named_buffers())
        assert changed is not norm_eval


def test_checkpointing_gives_the_same_gradients():
    x = torch.randn(1, 3, 32, 32)
    grads = []
    for with_cp in (False, True):
        torch.manual_seed(3)
        model = VSSMBackbone('nano', with_cp=with_cp, drop_path_rate=0.3).train()
        torch.manual_seed(4)
        sum(out.square().mean() for out in model(x)).backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-7)


def test_double_and_half_precision_models():
    x = torch.randn(1, 3, 32, 32)
    model = VSSMBackbone('nano').eval()
    expected = model(x)[-1]
    torch.testing.assert_close(model.double()(x.double())[-1].float(), expected, rtol=1e-4, atol=1e-4)
    half = model.bfloat16()(x.bfloat16())[-1]
    assert half.dtype == torch.bfloat16 and (half.float() - expected).abs().mean() < 0.1


def test_autocast_keeps_the_state_in_float32():
    model, x = VSSMBackbone('nano').eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)[-1]
        with torch.autocast('cpu', dtype=torch.bfloat16):
            out = model(x)[-1]
    assert (out.float() - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.parametrize(
    'kwargs, error, words',
    [
        (dict(arch='huge'), ValueError, ('arch', 'huge', 'tiny-s1l8')),
        (dict(arch=3), TypeError, ('arch', 'int')),
        (dict(arch=dict(SMALL, scan='x')), TypeError, ('scan', 'scan_mode')),
        (dict(arch=dict(depths=(1,))), TypeError, ('dims',)),
        (dict(arch=dict(SMALL, scan_mode='zigzag')), ValueError, ('scan_mode', 'zigzag', 'cross2d')),
        (dict(arch=dict(SMALL, d_state=0)), ValueError, ('d_state', '0')),
        (dict(arch=dict(SMALL, d_state=257)), ValueError, ('d_state', '257', '256')),
        (dict(arch=dict(SMALL, ssm_ratio=float('nan'))), ValueError, ('ssm_ratio', 'nan')),
        (dict(arch=dict(SMALL, mlp_ratio=-1)), ValueError, ('mlp_ratio', '-1')),
        (dict(arch=dict(SMALL, out_act='yes')), TypeError, ('out_act', 'yes')),
        (dict(arch=dict(SMALL, d_conv=4)), ValueError, ('d_conv', '4', 'odd')),
        (dict(arch=dict(dims=(16, 32), depths=(1, 1, 1))), ValueError, ('dims', 'depths')),
        (dict(arch=dict(dims=0, depths=(1,))), ValueError, ('dims[0]',)),
        (dict(arch=dict(dims=15, depths=(1,))), ValueError, ('dims[0]', 'even')),
        (dict(arch='nano', out_indices=(0, 4)), ValueError, ('out_indices', '3')),
        (dict(arch='nano', out_indices=()), ValueError, ('out_indices',)),
        (dict(arch='nano', frozen_stages=5), ValueError, ('frozen_stages', '5')),
        (dict(arch='nano', drop_path_rate=float('nan')), ValueError, ('drop_path_rate', 'nan')),
        (dict(arch='nano', drop_path=0.1), TypeError, ('drop_path',)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_options(kwargs, error, words):
    with pytest.raises(error) as raised:
        VSSMBackbone(**kwargs)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 4, 32, 32), (0, 3, 32, 32), (1, 3, 3, 32)], ids=str)
def test_bad_images(shape):
    with pytest.raises(ValueError, match='x has shape'):
        VSSMBackbone('nano')(torch.randn(shape))


@pytest.mark.parametrize('arch', ['nano', 'tiny-v0'])
def test_a_model_on_meta_gives_its_shapes(arch):
    with torch.device('meta'):
        model = VSSMBackbone(dict(ARCHS[arch], depths=(1, 1), dims=16), out_indices=(0, 1))
        maps = model(torch.empty(2, 3, 64, 96))
    assert [map.shape for map in maps] == [(2, 16, 16, 24), (2, 32, 8, 12)]
    assert all(map.is_meta for map in maps)

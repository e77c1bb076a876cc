"""Output strides, the stem's own map, and masked images."""

import pytest
import torch

from mmvmamba import VSSMBackbone
from mmvmamba.checkpoint import CheckpointError

ARCH = dict(dims=8, depths=(1, 1, 1))


def backbone(filled, **options):
    return filled(VSSMBackbone(ARCH, out_indices=(0, 1, 2), **options)).eval()


@pytest.mark.parametrize('strides, expected', [((1, 2, 1), (4, 8, 8)), ((1, 1, 1), (4, 4, 4)), ((1, 2, 2), (4, 8, 16))])
@pytest.mark.parametrize('size', [(64, 64), (37, 50)])
def test_strides_change_resolutions_but_no_weight(filled, strides, expected, size):
    plain, model = backbone(filled), backbone(filled, strides=strides)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    model.load_state_dict(plain.state_dict())
    outs = model(torch.randn(2, 3, *size))
    for out, stride in zip(outs, expected):
        assert out.shape[2:] == tuple(-(-side // stride) for side in size)


def test_a_stride_of_one_computes_the_pixels_that_a_stride_of_two_leaves_out(filled):
    x = torch.randn(1, 8, 9, 10)
    whole = backbone(filled, strides=(1, 1, 2)).layers[0].downsample(x)
    half = backbone(filled).layers[0].downsample(x)
    torch.testing.assert_close(whole[:, :, ::2, ::2], half)


@pytest.mark.parametrize('strides', [(2, 2, 2), (1, 2), (1, 2, 3), (1, True, 2), 8, (1, 2.0, 1.5)])
def test_bad_strides(strides):
    with pytest.raises(ValueError, match=r'strides is .*, expected 1 and then 1 or 2'):
        VSSMBackbone(ARCH, out_indices=(0,), strides=strides)


@pytest.mark.parametrize('downsample', ['merge', 'conv2'])
def test_what_merges_patches_has_no_stride_of_one(downsample):
    with pytest.raises(ValueError, match=f"downsample '{downsample}' cannot"):
        VSSMBackbone(dict(ARCH, downsample=downsample), out_indices=(0, 1, 2), strides=(1, 2, 1))


def test_map_of_the_stem(filled):
    plain, model = backbone(filled), backbone(filled, out_stem=True)
    calls = []
    model.patch_embed.register_forward_hook(lambda module, inputs, output: calls.append(output))
    x = torch.randn(2, 3, 36, 50, requires_grad=True)
    half, *maps = model(x)
    assert half.shape == (2, 4, 18, 25) and half.is_contiguous() and len(calls) == 1
    torch.testing.assert_close(half, plain.patch_embed[:5](x))
    for out, expected in zip(maps, plain(x)):
        torch.testing.assert_close(out, expected)
    half.sum().backward()
    assert x.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="stem 'patch4' has one convolution only"):
        VSSMBackbone(dict(ARCH, stem='patch4'), out_indices=(0,), out_stem=True)


def test_mask_token_replaces_cells(filled):
    model = backbone(filled, mask_token=True)
    plain = backbone(filled)
    assert set(model.state_dict()) - set(plain.state_dict()) == {'mask_token'}
    x, mask = torch.randn(2, 3, 32, 48), torch.rand(2, 8, 12) < 0.5
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    masked = model(x, mask)
    cells = seen[0].permute(0, 2, 3, 1)
    assert (cells[mask] == model.mask_token.flatten()).all()
    torch.testing.assert_close(cells[~mask], plain.patch_embed(x).permute(0, 2, 3, 1)[~mask])
    for out, expected in zip(model(x, mask * 0), plain(x)):
        torch.testing.assert_close(out, expected)
    assert not torch.equal(masked[0], model(x)[0])
    masked[2].sum().backward()
    assert model.mask_token.grad.abs().sum() > 0


def test_bad_masks(filled):
    model, x = backbone(filled, mask_token=True), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r'mask has shape \(1, 32, 32\), expected \(1, 8, 8\)'):
        model(x, torch.zeros(1, 32, 32))
    with pytest.raises(TypeError, match='mask is a list'):
        model(x, [0])
    with pytest.raises(ValueError, match='build it with mask_token=True'):
        backbone(filled)(x, torch.zeros(1, 8, 8))


def test_checkpoints_with_and_without_a_mask_token(filled, tmp_path):
    path = str(tmp_path / 'weights.pth')
    init_cfg = dict(type='Pretrained', checkpoint=path)
    with_token, without = backbone(filled, mask_token=True), backbone(filled)
    for source, target in ((with_token, without), (without, with_token)):
        torch.save(source.state_dict(), path)
        before = with_token.mask_token.clone()
        target.load_pretrained(init_cfg)
        assert torch.equal(with_token.mask_token, before)
    torch.save(VSSMBackbone(dict(ARCH, depths=(1, 1, 2)), out_indices=(0, 1, 2)).state_dict(), path)
    with pytest.raises(CheckpointError):
        with_token.load_pretrained(init_cfg)


@pytest.mark.parametrize('option', ['out_stem', 'mask_token'])
def test_switches_are_booleans(option):
    with pytest.raises(TypeError, match=option):
        VSSMBackbone(ARCH, out_indices=(0,), **{option: 1})


def test_simmim_trains_a_step():
    import mmpretrain.models  # noqa: F401
    from mmengine.registry import MODELS
    from mmpretrain.structures import DataSample

    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='SimMIM',
            backbone=dict(type='mmvmamba.VSSMBackbone', arch=ARCH, out_indices=(2,), mask_token=True),
            neck=dict(type='SimMIMLinearDecoder', in_channels=32, encoder_stride=16),
            head=dict(type='SimMIMHead', patch_size=4, loss=dict(type='PixelReconstructionLoss', criterion='L1')),
            _scope_='mmpretrain',
        )
    )
    images = torch.rand(2, 3, 32, 32)
    samples = [DataSample() for _ in images]
    for sample in samples:
        sample.mask = torch.rand(8, 8) < 0.6
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(8):
        loss = model.loss(images, samples)['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]

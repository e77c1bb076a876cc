"""The archs as timm's models."""

import pytest
import timm
import torch

import mmvmamba.integrations.timm as ours
from mmvmamba import VSSMBackbone
from mmvmamba.checkpoint import CheckpointError
from mmvmamba.models.archs import ARCHS

X = torch.rand(2, 3, 64, 64)


def published(model):
    """A model's weights under the names of the published classifier."""
    names = {'outnorm3.': 'classifier.norm.', 'fc.': 'classifier.head.'}
    state = {}
    for key, value in model.state_dict().items():
        start = next((name for name in names if key.startswith(name)), '')
        state[names.get(start, '') + key[len(start) :]] = value
    return state


@pytest.fixture(scope='module')
def source():
    torch.manual_seed(0)
    return timm.create_model('vmamba_nano', num_classes=10).eval()


@pytest.fixture
def path(source, tmp_path):
    torch.save(dict(model=published(source)), tmp_path / 'weights.pth')
    return str(tmp_path / 'weights.pth')


def test_every_arch_has_a_name():
    names = {f'vmamba_{arch.replace("-", "_")}' for arch in ARCHS}
    assert set(timm.list_models('vmamba_*')) == names <= set(ours.__all__)


@pytest.mark.parametrize('options, shape', [(dict(num_classes=7), (2, 7)), (dict(num_classes=0), (2, 256))])
def test_scores_and_pooled_maps(options, shape):
    model = timm.create_model('vmamba_nano', **options)
    assert model(X).shape == shape and model.forward_head(model.forward_features(X), pre_logits=True).shape == (2, 256)
    assert timm.create_model('vmamba_nano', num_classes=0, global_pool='')(X).shape == (2, 256, 2, 2)


def test_maps_of_stages(source):
    model = timm.create_model('vmamba_nano', features_only=True, in_chans=4, num_classes=0)
    assert [out.shape[1:] for out in model(torch.rand(1, 4, 64, 64))] == [
        (32, 16, 16),
        (64, 8, 8),
        (128, 4, 4),
        (256, 2, 2),
    ]
    assert model.feature_info.channels() == [32, 64, 128, 256] and model.feature_info.reduction() == [4, 8, 16, 32]
    some = timm.create_model('vmamba_nano', features_only=True, out_indices=(0, 2))
    assert [out.shape[1] for out in some(X)] == [32, 128] and len(some.model.layers) == 3
    seen = []
    handles = [stage.register_forward_hook(lambda module, inputs, out: seen.append(out)) for stage in source.layers]
    final, maps = source.forward_intermediates(X)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(first, second) for first, second in zip(maps, seen, strict=True))
    torch.testing.assert_close(final, source.forward_features(X))
    with pytest.raises(ValueError, match='output_fmt'):
        source.forward_intermediates(X, output_fmt='NLC')
    with pytest.raises(ValueError, match='expected stages from 0 to 3'):
        source.forward_intermediates(X, indices=[4])


def test_published_files(source, path):
    overlay = dict(file=path, num_classes=10)
    for options in (dict(pretrained=True, pretrained_cfg_overlay=overlay), dict(checkpoint_path=path)):
        model = timm.create_model('vmamba_nano', num_classes=10, **options).eval()
        assert torch.equal(model(X), source(X))
    model = timm.create_model('vmamba_nano', num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.forward_features(X), source.forward_features(X)) and model.fc.out_features == 3
    grey = timm.create_model('vmamba_nano', in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)
    one = X[:, :1]
    torch.testing.assert_close(grey.eval()(one), source(one.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    with pytest.raises((CheckpointError, RuntimeError)):
        timm.create_model('vmamba_tiny_s1l8', num_classes=10, pretrained=True, pretrained_cfg_overlay=overlay)


def test_it_is_the_backbone(source, path):
    backbone = VSSMBackbone('nano', out_indices=(3,), init_cfg=dict(type='Pretrained', checkpoint=path)).eval()
    backbone.init_weights()
    assert torch.equal(backbone(X)[0], source.forward_features(X))


def test_training_with_layer_decay_and_recomputing(source):
    from timm.optim import create_optimizer_v2

    model = timm.create_model('vmamba_nano', num_classes=10)
    model.load_state_dict(source.state_dict())
    model.set_grad_checkpointing()
    model(X).sum().backward()
    expected = timm.create_model('vmamba_nano', num_classes=10)
    expected.load_state_dict(source.state_dict())
    expected(X).sum().backward()
    for first, second in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(first.grad, second.grad)
    groups = create_optimizer_v2(model, 'adamw', lr=1e-3, layer_decay=0.5).param_groups
    assert len({group['lr_scale'] for group in groups}) == 7  # the stem, five blocks and the head

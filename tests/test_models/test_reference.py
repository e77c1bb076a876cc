"""The models reproduce the published code's numbers on filled parameters."""

import re

import numpy as np
import pytest
import torch

from mmvmamba import MM_VSSM, VSSMBackbone
from tests.fill import fill_array, fill_module

ARCH_OF = {
    'vmamba_tiny_s1l8': 'tiny-s1l8',
    'vmamba_tiny_s2l5': 'tiny-s2l5',
    'vanilla_vmamba_tiny': 'tiny-v0',
    'vmamba_small_s1l20': 'small-s1l20',
    'vmamba_small_s2l15': 'small-s2l15',
    'vanilla_vmamba_small': 'small-v0',
    'vmamba_base_s1l20': 'base-s1l20',
    'vmamba_base_s2l15': 'base-s2l15',
    'vanilla_vmamba_base': 'base-v0',
}
CASES = [
    ('vmamba_tiny_s1l8', 64, 64, 1e-5),
    ('vmamba_tiny_s1l8', 72, 104, 1e-5),
    ('vmamba_tiny_s2l5', 64, 64, 1e-5),
    ('vanilla_vmamba_tiny', 64, 64, 5e-5),
    ('abl_v05_noz', 64, 64, 1e-5),
    ('abl_v05_noz', 72, 104, 1e-5),
    ('abl_v0', 64, 64, 5e-5),
    ('abl_posembed', 64, 64, 5e-5),
]
EXTRA = ['abl_ssm0', 'abl_pe_v1_nonorm', 'abl_v0seq', 'abl_patch8', 'abl_postnorm']
CASES += [(variant, *size, 5e-5) for variant in EXTRA for size in ((64, 64), (72, 104))]


class Classifier(torch.nn.Module):
    """The published classifier around a backbone: its norm is ``outnorm3``, then pooling and a linear head."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = torch.nn.Linear(backbone.num_features[-1], 1000)

    def forward(self, x):
        return self.head(self.backbone(x)[-1].mean(dim=(2, 3)))


def published_name(name):
    """Name of a tensor of :class:`Classifier` in the published code."""
    name = name.removeprefix('backbone.').replace('outnorm3.', 'classifier.norm.')
    return 'classifier.' + name if name.startswith('head.') else name


def build_backbone(variant, tables, **options):
    """The backbone of a variant, by arch name where it has one, else through the published keywords.

    It is made without values, since all of them are filled; one that is not would stay NaN.
    """
    with torch.device('meta'):
        if variant in ARCH_OF:
            backbone = VSSMBackbone(ARCH_OF[variant], **options)
        else:
            backbone = MM_VSSM(**{**tables['variants'][variant]['kwargs'], **options})
    return backbone.to_empty(device='cpu')


def build(variant, tables, **options):
    """A filled classifier of a variant."""
    return fill_module(Classifier(build_backbone(variant, tables, out_indices=(3,), **options)), published_name).eval()


@pytest.mark.parametrize('variant, height, width, limit', CASES, ids=lambda value: str(value))
def test_logits(variant, height, width, limit, tables, model_reference, image):
    with torch.no_grad():
        logits = build(variant, tables)(image(height, width)).numpy()
    expected = model_reference[f'{variant}/{height}x{width}/logits']
    assert np.abs(logits - expected).max() < limit * expected.std()


@pytest.mark.parametrize('variant, height, width, limit', CASES, ids=lambda value: str(value))
def test_features(variant, height, width, limit, tables, model_reference, image):
    model = fill_module(build_backbone(variant, tables)).eval()
    with torch.no_grad():
        if model.arch.pos_embed:  # which the published classifier adds, and the published backbone forgets
            model.pos_embed.zero_()
        outs = model(image(height, width))
    reference = {
        key.split('/', 2)[2]: value
        for key, value in model_reference.items()
        if key.startswith(f'{variant}/{height}x{width}/')
    }
    for i, out in enumerate(outs):
        assert tuple(out.shape) == tuple(reference['feat_shape'][i])
        values = out.contiguous().flatten().numpy()[reference['feat_idx'][i]]
        assert np.abs(values - reference['feat_val'][i]).max() < 2e-4 * out.std()
        mean, std = out.mean(dim=(0, 2, 3)).numpy(), out.std(dim=(0, 2, 3), correction=0).numpy()
        assert np.abs(mean - reference[f'feat{i}/mean']).max() < 2e-4 * out.std()
        assert np.abs(std - reference[f'feat{i}/std']).max() < 2e-4 * out.std()


@pytest.mark.parametrize(
    'variant, with_cp',
    [(variant, with_cp) for variant in ('vmamba_tiny_s1l8', 'abl_v05_noz', 'abl_postnorm') for with_cp in (False, True)]
    + [(variant, False) for variant in ('abl_posembed', *EXTRA[:-1])],
)
def test_gradients(variant, with_cp, tables, model_reference, image):
    reference = {
        key.split('/', 2)[2]: value for key, value in model_reference.items() if key.startswith(f'grad/{variant}/')
    }
    options = dict(with_cp=with_cp) if variant in ARCH_OF else dict(use_checkpoint=with_cp)
    model = build(variant, tables, drop_path_rate=0.0, **options).train()
    x = image(64, 64).requires_grad_()
    loss = model(x).float().pow(2).mean()
    loss.backward()
    assert abs(loss.item() - reference['loss'][-1]) < 1e-5 * reference['loss'][-1]
    grads = {published_name(name): parameter.grad for name, parameter in model.named_parameters()}
    checked = 0
    for i, name in enumerate(reference['names']):
        grad = grads.pop(name.decode(), x.grad if name.decode() not in grads else None)
        norm = reference['norms'][i]
        assert abs(grad.norm().item() - norm) <= 5e-4 * norm, name
        values = grad.flatten().numpy()[reference['idx'][i]]
        expected = reference['val'][i]
        assert np.abs(values - expected).max() <= 5e-4 * np.abs(expected).max() + 1e-6 * norm, name
        checked += 1
    assert checked == len(reference['names']) and not grads


@pytest.mark.parametrize('variant', ARCH_OF)
def test_parameter_count(variant, tables):
    with torch.device('meta'):
        model = Classifier(VSSMBackbone(ARCH_OF[variant], out_indices=(3,)))
    assert sum(p.numel() for p in model.parameters()) == tables['variants'][variant]['params']


@pytest.mark.parametrize('variant', ['abl_posembed', *EXTRA])
def test_extra_parameters(variant, tables):
    model = build_backbone(variant, tables, out_indices=(3,))
    classifier = 256 * 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) == tables['variants'][variant]['params'] - classifier
    first = {k: list(v.shape) for k, v in model.state_dict().items() if not re.match(r'layers\.[1-9]|outnorm', k)}
    first = {k: v for k, v in first.items() if not re.match(r'layers\.0\.blocks\.[1-9]', k)}
    assert first == dict(tables['first_stage_keys'][variant])


@pytest.mark.parametrize('variant', ['vmamba_tiny_s1l8', 'vmamba_tiny_s2l5', 'vanilla_vmamba_tiny'])
def test_state_dict_names_and_shapes(variant, tables):
    with torch.device('meta'):
        model = Classifier(VSSMBackbone(ARCH_OF[variant], out_indices=(3,)))
    state = {published_name(name): list(value.shape) for name, value in model.state_dict().items()}
    assert state == dict(tables['state_dicts'][variant])


def test_published_keywords_equal_arch_names(tables):
    for variant, arch in ARCH_OF.items():
        with torch.device('meta'):
            ours, theirs = VSSMBackbone(arch), MM_VSSM(**tables['variants'][variant]['kwargs'])
        assert ours.arch == theirs.arch, variant


def test_fill_reproduces_the_reference_rule():
    import zlib

    assert zlib.crc32(fill_array('layers.0.blocks.0.op.dt_projs_bias', (4, 96)).tobytes()) == 0x642FE1DA
    assert zlib.crc32(fill_array('patch_embed.0.weight', (48, 3, 3, 3)).tobytes()) == 0xFE8B5919

"""Mamba-2 blocks (core ``ssd``): the published numbers, their own options, and what the backbone promises of them."""

import copy
import json

import numpy as np
import pytest
import torch

from mmvmamba import MM_VSSM, VSSMBackbone
from mmvmamba.layers import SS2D, SS2DOptions
from mmvmamba.models import parse_forward_type
from tests.conftest import DATA
from tests.fill import fill_module
from tests.test_models import test_reference as reference
from tests.test_models.published import Published
from tests.test_models.test_module_contract import assert_same, outputs_of
from tests.test_models.test_reference import Classifier, build, build_backbone, published_name

VARIANT = 'abl_m0_noz'
SIZES = [(64, 64), (72, 104)]
SMALL = dict(core='ssd', d_state=4, dims=16, depths=(1, 1))


@pytest.fixture(scope='module')
def extra_tables():
    return json.loads((DATA / 'extra_tables.json').read_text())


@pytest.fixture(scope='module')
def extra_reference():
    return dict(np.load(DATA / 'extra_reference.npz'))


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_logits(size, extra_tables, extra_reference, image):
    with torch.no_grad():
        logits = build(VARIANT, extra_tables)(image(*size)).numpy()
    expected = extra_reference[f'{VARIANT}/{size[0]}x{size[1]}/logits']
    assert np.abs(logits - expected).max() < 5e-5 * expected.std()


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_features(size, extra_tables, extra_reference, image):
    reference.test_features(VARIANT, *size, None, extra_tables, extra_reference, image)


@pytest.mark.parametrize('with_cp', [False, True], ids=['plain', 'checkpointed'])
def test_gradients(with_cp, extra_tables, extra_reference, image):
    reference.test_gradients(VARIANT, with_cp, extra_tables, extra_reference, image)


@pytest.mark.parametrize('name', ['tiny', 'small', 'base'])
def test_archs_are_the_published_ones(name, tables):
    published = tables['variants'][f'vmamba_{name}_m2']
    with torch.device('meta'):
        model = Classifier(VSSMBackbone(f'{name}-m2', out_indices=(3,)))
        assert MM_VSSM(**published['kwargs']).arch == VSSMBackbone(f'{name}-m2').arch
    assert sum(p.numel() for p in model.parameters()) == published['params']


def test_state_dict_names_and_shapes(extra_tables):
    model = build_backbone(VARIANT, extra_tables)
    state = {published_name(name): list(value.shape) for name, value in model.state_dict().items()}
    expected = dict(extra_tables['first_stage_keys'][VARIANT])
    assert expected and expected == {name: state[name] for name in expected}
    own = {name for name in state if name.startswith(('layers.0.', 'patch_embed.'))}
    assert own == set(expected)


@pytest.mark.parametrize('postfix', ['no32', 'oact', 'noz', 'nozact', 'onnone', 'ondwconv3', 'oncnorm', 'onsigmoid'])
def test_postfixes_of_the_published_spelling(postfix):
    options = parse_forward_type(f'm0_{postfix}')
    assert options['core'] == 'ssd' and options['scan_mode'] == 'cross2d' and options['force_fp32'] is False
    others = {name: value for name, value in options.items() if name != 'core'}
    assert others == {**parse_forward_type(f'v05_{postfix}')}
    model = VSSMBackbone(dict(SMALL, **options), out_indices=(0, 1))
    outs = model(torch.randn(2, 3, 20, 24))
    sum(out.square().mean() for out in outs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    'option, value',
    [
        ('scan_mode', 'unidi'),
        ('scan_mode', 'bidi'),
        ('gate', 'silu'),
        ('force_fp32', True),
        ('ssm_init', 'randn'),
        ('ssm_init', 'zeros'),
        ('d_conv', 1),
        ('conv_bias', True),
        ('dt_rank', 4),
        ('ssm_ratio', 2.0),
        ('act', 'silu'),
    ],
    ids=str,
)
def test_every_option_trains(option, value):
    model = VSSMBackbone(dict(SMALL, **{option: value}), out_indices=(0, 1))
    outs = model(torch.randn(2, 3, 20, 24))
    sum(out.square().mean() for out in outs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gelu_is_the_default_activation():
    assert VSSMBackbone(SMALL, out_indices=(0, 1)).arch.ssm.act == 'gelu'
    assert VSSMBackbone(dict(SMALL, core='s6'), out_indices=(0, 1)).arch.ssm.act == 'silu'


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(core='s4'), "core is 's4', expected one of s6, ssd"),
        (dict(core='ssd', scan_mode='cascade2d'), "scan_mode is 'cascade2d', expected cross2d, unidi or bidi"),
        (dict(with_initial_state=True), "with_initial_state is True, expected False for core 's6'"),
        (dict(core='ssd', dt_rank=5), 'dt_rank is 5, expected a divisor of the 16 channels'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_errors_name_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        SS2D(16, SS2DOptions(**options))


def test_state_is_carried_between_calls():
    """As published: a call starts from what the last one left, added up over its batch."""
    options = SS2DOptions(core='ssd', d_state=4, with_initial_state=True)
    model = fill_module(SS2D(16, options)).train()
    plain = SS2D(16, SS2DOptions(core='ssd', d_state=4))
    with torch.no_grad():
        model.initial_state.zero_()
    assert not plain.load_state_dict(model.state_dict(), strict=False).missing_keys
    x = torch.randn(3, 16, 5, 6, requires_grad=True)
    first, second = model(x), model(x)
    assert torch.equal(first, plain(x)) and not torch.allclose(first, second, rtol=1e-3)
    (first + second).square().sum().backward()  # neither call's state was overwritten by the other
    assert x.grad.isfinite().all() and model.initial_state.shape == (1, 4, 16, 4)
    assert 'initial_state' in model.state_dict() and not model.initial_state.requires_grad
    before = model.initial_state.clone()
    model(x)
    assert not torch.equal(before, model.initial_state)


def test_a_carried_state_and_checkpointing_exclude_each_other():
    with pytest.raises(ValueError, match='with_cp is True, expected False with_initial_state'):
        VSSMBackbone(dict(SMALL, with_initial_state=True), out_indices=(0, 1), with_cp=True)


def test_modules_are_called_as_the_published_structure_calls_them():
    """Hooks on the parts of a mixer see the maps of torch's own layers, and what a hook returns counts."""
    backbone = VSSMBackbone(dict(SMALL, gate='linear'), out_indices=(0, 1)).eval()
    plain, x = Published(backbone), torch.randn(2, 3, 24, 20)
    names = ['conv2d', 'conv2d.1', 'act', 'in_proj', 'out_norm', 'out_proj', '']
    names = [f'layers.0.blocks.0.op.{name}'.rstrip('.') for name in names]
    (outs, maps), (expected, expected_maps) = (outputs_of(model, names, x) for model in (backbone, plain))
    assert_same(maps, expected_maps)
    for name in names:
        assert_same(outs[name], expected[name])
    for model in (backbone, plain):
        model.get_submodule(names[1]).register_forward_hook(lambda *call: 2 * call[2])
    assert_same(backbone(x), plain(x))


@pytest.mark.parametrize('carried', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['plain', 'carried'])
def test_one_graph_of_any_size(carried):
    torch._dynamo.reset()
    options = dict(SMALL, with_initial_state=carried)
    model = VSSMBackbone(options, out_indices=(0, 1)).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend='aot_eager', dynamic=True)
    for size in ((20, 28), (36, 24)):
        x = torch.randn(2, 3, *size)
        outs, expected = compiled(x), model(x)
        assert_same(outs, expected)
        for maps in (outs, expected):
            sum(out.square().mean() for out in maps).backward()
    for (name, value), other in zip(twin.state_dict().items(), model.state_dict().values()):
        assert 'initial_state' not in name or torch.allclose(value, other, rtol=1e-4, atol=1e-6)
    for value, other in zip(twin.parameters(), model.parameters()):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-4, atol=1e-5)

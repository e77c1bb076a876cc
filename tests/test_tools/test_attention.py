"""The scan as attention, against the scan itself and the published products; and that of a vision transformer."""

import pytest
import torch
from torch import nn

from mmvmamba import VSSMBackbone
from mmvmamba.analysis.scan_attention import FORMS, attention_matrix, record_scan, route_order, scan_attention
from mmvmamba.analysis.vit_attention import vit_attention
from mmvmamba.ops import cross_merge, cross_scan, selective_scan
from tests.fill import fill_module


@pytest.fixture(scope='module', params=[('cross2d', 1), ('cross2d', 3), ('bidi', 1), ('unidi', 2)], ids=str)
def call(request, filled):
    scan_mode, d_state = request.param
    arch = dict(dims=8, depths=(2, 1), scan_mode=scan_mode, d_state=d_state, ssm_ratio=2.0, gate='silu')
    backbone = filled(VSSMBackbone(arch, out_indices=(0, 1))).eval()
    return record_scan(backbone, 0, 1, torch.randn(1, 3, 24, 20))


def linear_scan(call, x):
    """The scan with the delta, B and C of the recorded map, as a function of the values alone."""
    dt_rank, d_state = call['dt_projs_weight'].shape[2], call['A_logs'].shape[1]
    maps = call['x_proj_weight'] @ cross_scan(call['x'], call['scan_mode'])
    dts, B, C = maps.split([dt_rank, d_state, d_state], dim=2)
    y = selective_scan(
        cross_scan(x, call['scan_mode'], backend='naive').flatten(1, 2),
        (call['dt_projs_weight'] @ dts).flatten(1, 2),
        -call['A_logs'].exp(),
        B,
        C,
        call['Ds'],
        call['dt_projs_bias'].flatten(),
        delta_softplus=True,
        backend='naive',
    )
    return cross_merge(y.unflatten(1, (4, -1)), tuple(x.shape[2:]), call['scan_mode'], backend='naive')


@pytest.mark.parametrize('row, column', [(0, 0), (2, 3), (5, 4)])
def test_weights_are_the_gradient_of_the_scan_and_give_its_output(call, row, column):
    attention = scan_attention(call, row, column)
    assert attention.error() < 1e-12
    x = call['x'].clone().requires_grad_()
    y = linear_scan(call, x)
    torch.testing.assert_close(y, call['output'], rtol=1e-10, atol=1e-12)
    (expected,) = torch.autograd.grad(y[0, :, row, column].sum(), x)  # channels don't mix in the scan
    merged = attention.weights.sum(dim=0)
    merged[:, row, column] += attention.skip
    torch.testing.assert_close(merged, expected[0], rtol=1e-9, atol=1e-12)


def test_weights_of_heads_give_the_output():
    options = dict(dims=8, depths=(1,), core='ssd', d_state=3, dt_rank=2)
    backbone = fill_module(VSSMBackbone(options, out_indices=(0,))).eval()
    recorded = record_scan(backbone, 0, 0, torch.randn(1, 3, 24, 20))
    assert scan_attention(recorded, 2, 3).error() < 1e-12
    for form in FORMS:
        row = attention_matrix(recorded, form)[:, 2 * 5 + 3].view(4, 6, 5)
        torch.testing.assert_close(row, scan_attention(recorded, 2, 3, form).raw().float())


def published_matrix(call, form):
    """Attention maps of every route in its own order, by the published formula: products of queries and keys."""
    dt_rank, d_state = call['dt_projs_weight'].shape[2], call['A_logs'].shape[1]
    maps = (call['x_proj_weight'] @ cross_scan(call['x'], call['scan_mode']))[0]
    dts, B, C = maps.split([dt_rank, d_state, d_state], dim=1)
    delta = nn.functional.softplus(call['dt_projs_weight'] @ dts + call['dt_projs_bias'].unsqueeze(-1))
    A = -call['A_logs'].exp().view(4, -1, d_state, 1)
    w = (A * delta.unsqueeze(2)).cumsum(dim=-1).exp()  # (K, D, N, L)
    queries, keys = torch.ones_like(w), torch.ones_like(w)
    if form != 'ww':
        queries, keys = queries * C.unsqueeze(1), keys * B.unsqueeze(1)
    if 'w' in form:
        queries, keys = queries * w, keys / w
    if 'dt' in form:
        keys = keys * delta.unsqueeze(2)
    return (queries.transpose(2, 3) @ keys).tril()  # (K, D, L, L)


@pytest.mark.parametrize('form', FORMS)
def test_forms_are_the_published_products(call, form):
    matrix, order, calls = published_matrix(call, form), route_order(call), []
    height, width = call['x'].shape[2:]
    found = attention_matrix(call, form, lambda: calls.append(1))
    assert len(calls) == height
    for route, steps in enumerate(order):
        expected = matrix[route].mean(dim=0)
        torch.testing.assert_close(found[route][steps][:, steps], expected.float(), rtol=1e-5, atol=1e-12)
    for row, column in ((0, 0), (2, 3), (height - 1, width - 1)):
        attention = scan_attention(call, row, column, form)
        for route, steps in enumerate(order):
            i = steps.tolist().index(row * width + column)
            read = attention.weights[route].flatten(1)[:, steps]
            torch.testing.assert_close(read, matrix[route][:, i], rtol=1e-9, atol=1e-14)
    if form != 'CwBdtw':
        with pytest.raises(ValueError, match=f"form is '{form}', whose weights do not give the output"):
            attention.error()


def test_values_of_the_paper_are_read_by_the_form_without_step_size(call):
    """C w B times delta u is the scan's output, as C w B delta times u is."""
    attention, order = scan_attention(call, 2, 3, 'CwBw'), route_order(call)
    delta = published_matrix(call, 'CBdt').diagonal(dim1=-2, dim2=-1) / published_matrix(call, 'CB').diagonal(
        dim1=-2, dim2=-1
    )
    u = call['x'][0].flatten(1)[:, order].transpose(0, 1)
    read = sum((attention.weights[k].flatten(1)[:, order[k]] * delta[k] * u[k]).sum(dim=-1) for k in range(4))
    read = read + attention.skip * attention.x[:, 2, 3]
    torch.testing.assert_close(read, call['output'][0, :, 2, 3], rtol=1e-9, atol=1e-12)


def test_forms_and_maps_that_are_refused(call, monkeypatch):
    for function in (attention_matrix, lambda call, form: scan_attention(call, 0, 0, form)):
        with pytest.raises(ValueError, match="form is 'CBw', expected one of CB, CBdt, CwBw, CwBdtw, ww"):
            function(call, 'CBw')
    monkeypatch.setattr('mmvmamba.analysis.scan_attention.MAX_PIXELS', 29)
    with pytest.raises(ValueError, match='the map has 30 pixels, expected at most 29'):
        attention_matrix(call)


VIT = dict(
    type='mmpretrain.VisionTransformer',
    arch=dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=32),
    img_size=32,
    patch_size=8,
)


@pytest.mark.parametrize(
    'changes, extra',
    [
        ({}, 1),
        (dict(type='mmpretrain.DistilledVisionTransformer'), 2),
        (dict(with_cls_token=False, out_type='avg_featmap', layer_cfgs=dict(qkv_bias=False)), 0),
    ],
    ids=['class token', 'distilled', 'no token'],
)
def test_attention_of_a_vision_transformer_is_what_it_computes(filled, changes, extra):
    from mmpretrain.models import build_backbone

    backbone, x = filled(build_backbone({**VIT, **changes})), torch.randn(1, 3, 40, 24)
    backbone.eval()  # which returns None
    projected = []
    handle = backbone.layers[1].attn.qkv.register_forward_hook(lambda _module, _inputs, out: projected.append(out))
    attention = vit_attention(backbone, -2, x)
    handle.remove()
    assert attention.error() < 1e-12 and attention.layer == 1 and attention.grid == (5, 3)
    query, key, _ = projected[0].double()[0].unflatten(1, (3, 2, 8)).permute(1, 2, 0, 3)
    tokens = 15 + extra
    identity = torch.eye(tokens, dtype=torch.float64).expand(2, -1, -1)
    expected = nn.functional.scaled_dot_product_attention(query, key, identity)
    torch.testing.assert_close(attention.weights, expected, rtol=1e-4, atol=1e-6)  # its input was float32
    weights, scores = attention.of_patch(2, 1)
    torch.testing.assert_close(weights.flatten(), attention.weights[:, extra + 7, extra:].mean(dim=0))
    torch.testing.assert_close(scores.flatten(), attention.scores[:, extra + 7, extra:].mean(dim=0))


def test_scale_of_a_config_is_the_one_that_is_computed_with(filled):
    from mmpretrain.models import build_backbone

    backbone = filled(build_backbone(VIT))
    backbone.layers[0].attn = filled(type(backbone.layers[0].attn)(16, 2, qk_scale=0.5)).eval()
    backbone.eval()
    assert vit_attention(backbone, 0, torch.randn(1, 3, 32, 32)).error() < 1e-12


def test_backbones_without_such_attention_are_refused(filled):
    from mmpretrain.models import build_backbone

    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match='layer is 3, expected 0 to 2'):
        vit_attention(build_backbone(VIT), 3, x)
    for backbone in (VSSMBackbone('nano'), build_backbone(dict(type='mmpretrain.ResNet', depth=18))):
        with pytest.raises(ValueError, match=f'is a {type(backbone).__name__}, expected a VisionTransformer'):
            vit_attention(backbone, 0, x)


def test_a_route_reads_what_it_has_passed_and_shares_sum_to_one(call):
    attention = scan_attention(call, 2, 3)
    rows = attention.weights[0].abs().sum(dim=0).flatten()
    passed = 2 * attention.x.shape[2] + 3
    assert (rows[: passed + 1] > 0).all() and (rows[passed + 1 :] == 0).all()
    shares, merged = attention.normalized()
    torch.testing.assert_close(shares.sum(dim=(1, 2)), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(merged.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert attention.raw().shape == (4, *attention.x.shape[1:])


def test_places_without_a_map_are_refused(call):
    with pytest.raises(ValueError, match=r'pixel \(6, 0\) lies outside the map of 6 rows and 5 columns'):
        scan_attention(call, 6, 0)
    backbone = VSSMBackbone(dict(dims=8, depths=(1, 1), scan_mode='cascade2d'), out_indices=(0,))
    for stage, block, words in ((1, 0, 'stage is 1'), (0, 1, 'block is 1'), (0, 0, 'cascade2d')):
        with pytest.raises(ValueError, match=words):
            record_scan(backbone, stage, block, torch.randn(1, 3, 32, 32))
    backbone = VSSMBackbone(dict(dims=8, depths=(1,), ssm_ratio=0), out_indices=(0,))
    with pytest.raises(ValueError, match='ssm_ratio is 0, which leaves no scan'):
        record_scan(backbone, 0, 0, torch.randn(1, 3, 32, 32))

"""The building blocks against the equations they stand for."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmvmamba.layers import SS2D, SS2DOptions, VSSBlock
from mmvmamba.layers.cascade import cascade_scan
from mmvmamba.layers.conv_norm import build_out_norm
from mmvmamba.layers.downsample import PatchMerging, build_downsample
from mmvmamba.layers.mlp import Mlp
from mmvmamba.layers.norm import build_norm
from mmvmamba.layers.ssm_init import init_ssm
from mmvmamba.layers.stem import build_stem


def test_mamba_initialisation():
    parameters = init_ssm('mamba', routes=4, d_inner=64, d_state=8, dt_rank=4)
    A = -torch.exp(parameters['A_logs'])
    torch.testing.assert_close(A, -torch.arange(1.0, 9).expand(256, 8))
    dt = F.softplus(parameters['dt_projs_bias'])
    assert dt.min() >= 1e-4 and dt.max() <= 0.1 * 1.001
    assert dt.log().std() > 0.8  # log-uniform over two decades: 1.33
    assert parameters['dt_projs_weight'].abs().max() <= 0.5 and torch.equal(parameters['Ds'], torch.ones(256))


@pytest.mark.parametrize('ssm_init, value', [('zeros', 0.0), ('randn', None)])
def test_other_initialisations(ssm_init, value):
    A_logs = init_ssm(ssm_init, routes=4, d_inner=64, d_state=2, dt_rank=4)['A_logs']
    assert A_logs.std() == 0 if value == 0.0 else 0.9 < A_logs.std() < 1.1


def test_patch_merging_order():
    merge = PatchMerging(1, 4, 'ln')
    merge.norm = torch.nn.Identity()
    torch.nn.init.eye_(merge.reduction.weight)
    x = torch.arange(4.0).view(1, 1, 2, 2)  # [[0, 1], [2, 3]]
    assert merge(x).flatten().tolist() == [0, 2, 1, 3]  # down, then right


@pytest.mark.parametrize('downsample', ['merge', 'conv2', 'conv3'])
@pytest.mark.parametrize('size', [(1, 1), (1, 6), (7, 8)], ids=str)
def test_downsample_sizes(downsample, size):
    out = build_downsample(downsample, 8, 16, 'ln')(torch.randn(2, 8, *size))
    rounding = math.floor if downsample == 'conv2' else math.ceil
    assert tuple(out.shape) == (2, 16, *(max(1, rounding(side / 2)) for side in size))


def test_stem_sizes():
    assert build_stem('patch4', 3, 8, 'ln')(torch.randn(1, 3, 35, 34)).shape == (1, 8, 8, 8)
    assert build_stem('conv3x2', 3, 8, 'ln')(torch.randn(1, 3, 35, 34)).shape == (1, 8, 9, 9)


def test_norms_of_a_map():
    x = torch.randn(2, 8, 5, 6) * 3 + 1
    for name in ('ln', 'ln2d'):
        out = build_norm(name, 8)(x)
        torch.testing.assert_close(out.mean(1), torch.zeros(2, 5, 6), atol=1e-5, rtol=0)
    out = build_norm('bn', 8).train()(x)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)
    out = build_out_norm('softmax', 8)(x)
    torch.testing.assert_close(out.sum((2, 3)), torch.ones(2, 8))


def test_gated_mlp():
    mlp, x = Mlp(8, 16, gated=True), torch.randn(2, 3, 4, 8)
    value, gate = (x @ mlp.fc1.weight.T + mlp.fc1.bias).chunk(2, dim=-1)
    out = mlp(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, (value * F.gelu(gate)) @ mlp.fc2.weight.T + mlp.fc2.bias)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    'layer, x, last', [(Mlp(8, 16), torch.randn(1, 8, 3, 4), 'fc2'), (SS2D(8), torch.randn(1, 8, 3, 4), 'out_proj')]
)
def test_replaced_linear_layers_and_hooks_are_called(layer, x, last):
    plain = layer(x)
    linear, seen = getattr(layer, last), []
    hooks = [
        linear.register_forward_pre_hook(lambda *_: seen.append('forward pre')),
        linear.register_forward_hook(lambda *_: seen.append('forward')),
        linear.register_full_backward_pre_hook(lambda *_: seen.append('backward pre')),
        linear.register_full_backward_hook(lambda *_: seen.append('backward')),
    ]
    layer(x).sum().backward()
    assert seen == ['forward pre', 'forward', 'backward pre', 'backward']
    for hook in hooks:
        hook.remove()
    linear.__class__ = Doubled
    torch.testing.assert_close(layer(x), 2 * plain)
    linear.__class__, linear.forward = torch.nn.Linear, lambda x: x.new_zeros(*x.shape[:-1], 8)
    assert not layer(x).any()


def test_replaced_layers_of_other_options_are_called():
    mlp, ss2d = Mlp(8, 16), SS2D(8)
    x = torch.randn(1, 8, 3, 4)

    def unfused(x):
        return mlp.fc2(mlp.act(mlp.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)

    mlp.act = torch.nn.GELU('tanh')
    torch.testing.assert_close(mlp(x), unfused(x), rtol=0, atol=1e-6)
    mlp.fc2 = torch.nn.Linear(16, 8, bias=False)
    torch.testing.assert_close(mlp(x), unfused(x))
    plain, bias = ss2d(x), torch.arange(8.0)
    with_bias = torch.nn.Linear(8, 8)
    with_bias.load_state_dict(dict(weight=ss2d.out_proj.weight, bias=bias))
    ss2d.out_proj = with_bias
    torch.testing.assert_close(ss2d(x), plain + bias.view(8, 1, 1))


def scan_line(x, x_proj, dt_proj, bias, A_logs, Ds):
    """One line (L, D) by the recurrence, parameters of one route; A is (D, N)."""
    rank, states = dt_proj.shape[1], A_logs.shape[1]
    h, out = torch.zeros(x.shape[1], states, dtype=x.dtype), []
    for pixel in x:
        dts, B, C = (x_proj @ pixel).split([rank, states, states])
        delta = F.softplus(dt_proj @ dts + bias)
        h = torch.exp(-delta[:, None] * A_logs.exp()) * h + delta[:, None] * B * pixel[:, None]
        out.append(h @ C + Ds * pixel)
    return torch.stack(out)


def test_cascade_is_rows_then_columns():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    parameters = [torch.randn(shape, dtype=torch.float64) for shape in ((4, 6, 5), (4, 5, 2), (4, 5), (20, 2), (20,))]
    x_proj, dt_proj, bias, A_logs, Ds = parameters

    def scan(lines, routes):
        total = 0
        for reverse, k in enumerate(routes):
            line = lines.flip(0) if reverse else lines
            total = total + scan_line(
                line, x_proj[k], dt_proj[k], bias[k], A_logs[5 * k : 5 * k + 5], Ds[5 * k : 5 * k + 5]
            )
        return total

    y = F.layer_norm(x[0], (5,))
    y = torch.stack([scan(row, (0, 1)) for row in y])
    y = F.layer_norm(y, (5,))
    y = torch.stack([scan(column, (2, 3)) for column in y.transpose(0, 1)]).transpose(0, 1)
    torch.testing.assert_close(cascade_scan(x, *parameters)[0], y)


def test_ss2d_gates():
    x = torch.randn(1, 8, 4, 4)
    for gate, width in (('none', 8), ('silu', 16), ('linear', 16)):
        layer = SS2D(8, SS2DOptions(gate=gate))
        assert layer.in_proj.out_features == width and layer(x).shape == x.shape


def test_block_adds_its_branches():
    block, x = VSSBlock(8, SS2DOptions()), torch.randn(1, 8, 4, 4)
    middle = x + block.op(block.norm(x))
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)))
    for parameter in (block.op.out_proj.weight, block.mlp.fc2.weight, block.mlp.fc2.bias):
        torch.nn.init.zeros_(parameter)
    assert torch.equal(block(x), x)


def test_a_ratio_that_leaves_no_channel():
    with pytest.raises(ValueError, match=r'ssm_ratio is 0.01, which leaves no channel of 8'):
        SS2D(8, SS2DOptions(ssm_ratio=0.01))

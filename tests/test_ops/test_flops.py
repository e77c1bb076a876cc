"""What torch's counter says of the ops, against the rule of the published tables and its own layers."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba.ops import selective_scan, ss2d_scan, ssd_scan
from tests.test_tools.conftest import ROOT, load_tool

SCAN = dict(batch=2, channels=8, height=5, width=6, dt_rank=3, d_state=2)


@pytest.fixture(scope='module')
def rule():
    return load_tool('analysis/get_flops.py')


def count(function, *shapes, device='cpu'):
    """FLOPs of a function of random tensors, forward and backward, by torch's counter."""
    tensors = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    with FlopCounterMode(display=False) as forward:
        out = function(*tensors)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_selective_scan(rule):
    batch, dim, length, d_state = 2, 6, 11, 4
    sequence, matrix = (batch, dim, length), (batch, 3, d_state, length)
    forward, backward = count(selective_scan, sequence, sequence, (dim, d_state), matrix, matrix)
    assert forward == rule.selective_scan_flops(batch, dim, length, d_state)
    assert backward == 2 * forward


def test_ss2d_scan(rule):
    batch, channels, height, width, dt_rank, d_state = SCAN.values()
    projections = (4, dt_rank + 2 * d_state, channels), (4, channels, dt_rank), (4, channels)
    forward, backward = count(
        ss2d_scan, (batch, channels, height, width), *projections, (4 * channels, d_state), (4 * channels,)
    )
    scan = rule.selective_scan_flops(batch, 4 * channels, height * width, d_state)
    published = rule.scan_flops((batch, channels, height, width), dt_rank, d_state)
    assert forward == scan + 2 * (published - scan)  # a multiply-add of a product is two here, and one there
    assert backward == 2 * forward


@pytest.mark.parametrize('length', [40, 200])
def test_ssd_scan(length, rule):
    """A multiply-add of a product is two here, and one in the tables; the skip connection is one in both."""
    batch, heads, channels, d_state = 2, 3, 5, 7
    matrix = (batch, length, 1, d_state)
    forward, backward = count(
        ssd_scan, (batch, length, heads, channels), (batch, length, heads), (heads,), matrix, matrix
    )
    chunk = min(length, 64)
    pairs = batch * length * chunk * d_state  # C B^T, which the heads share
    products = pairs + batch * length * heads * (chunk * channels + 2 * channels * d_state)
    skip = batch * length * heads * channels
    assert forward == 2 * products + skip and backward == 2 * forward
    assert rule.ssd_flops(batch, length, heads, channels, d_state, routes=1) == products + skip


def test_whole_model_counts_twice_what_the_tables_do(rule):
    (path,) = (ROOT / 'configs/demo').glob('vmamba-nano_1xb*_digits-32px.py')
    published = rule.count(Config.fromfile(path), (64, 64))
    model, operators = published._model, published.by_operator()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    sizes = [(32, 16), (64, 8), (128, 4), (128, 4), (256, 2)]  # channels and side of each of the five blocks
    scans = sum(rule.selective_scan_flops(1, 4 * channels, side**2, 1) for channels, side in sizes)
    products = operators['conv'] + operators['linear'] + operators['scan_routes'] - scans
    assert counter.get_total_flops() == scans + 2 * products


OPS = torch.ops.mmvmamba
CONV = dict(stride=2, padding=1)
# an op, its backward, and torch's own layers; the first two take the tensors, dy and the second result of the op
LAYERS = {
    'linear': (
        lambda x, weight: OPS.linear(x, weight, True),
        lambda dy, narrow, x, weight: OPS.linear_backward(dy, x, narrow),
        F.linear,
        ((2, 5, 8), (16, 8)),
    ),
    'mlp': (
        lambda *tensors: OPS.mlp(*tensors, True),
        lambda dy, hidden, x, weight1, bias1, weight2, bias2: OPS.mlp_backward(dy, x, hidden, weight1, weight2),
        lambda x, weight1, bias1, weight2, bias2: F.linear(F.linear(x, weight1, bias1), weight2, bias2),
        ((2, 5, 8), (32, 8), (32,), (8, 32), (8,)),
    ),
    'depthwise_conv_silu': (
        lambda *tensors: (OPS.depthwise_conv_silu(*tensors), None),
        lambda dy, _, *tensors: OPS.depthwise_conv_silu_backward(dy, *tensors),
        lambda x, *weights: F.conv2d(x.permute(0, 3, 1, 2), *weights, padding=1, groups=8),
        ((2, 6, 7, 8), (8, 1, 3, 3), (8,)),
    ),
    'conv2d_channel_last': (
        lambda *tensors: (OPS.conv2d_channel_last(*tensors, 2, 1), None),
        lambda dy, _, x, weight, bias: OPS.conv2d_channel_last_backward(dy, x, weight, 2, 1, True, True),
        lambda x, *weights: F.conv2d(x.permute(0, 3, 1, 2), *weights, **CONV),
        ((2, 6, 7, 8), (16, 8, 3, 3), (16,)),
    ),
    'conv2d_channel_last of an image': (
        lambda *tensors: (OPS.conv2d_channel_last(*tensors, 2, 1), None),
        lambda dy, _, x, weight, bias: OPS.conv2d_channel_last_backward(dy, x, weight, 2, 1, False, True),
        lambda x, *weights: F.conv2d(x.detach().permute(0, 3, 1, 2), *weights, **CONV),
        ((2, 6, 7, 3), (16, 3, 3, 3), (16,)),
    ),
}


@pytest.mark.parametrize('name', LAYERS)
def test_fused_layers_count_as_the_layers_of_torch(name):
    fused, fused_backward, plain, shapes = LAYERS[name]
    tensors = [torch.empty(shape, device='meta') for shape in shapes]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out, kept = fused(*tensors)
    with torch.no_grad(), FlopCounterMode(display=False) as backward_counter:
        fused_backward(out, kept, *tensors)
    forward, backward = count(plain, *shapes, device='meta')
    if name == 'depthwise_conv_silu':
        backward = 2 * forward  # torch forgets the groups there
    assert counter.get_total_flops() == forward > 0
    assert backward_counter.get_total_flops() == backward

"""Exercise every kernel at odd sizes and in every dtype: ``sanitized.py [cpu|cuda]``.

Run by test_sanitizers.py with instrumented CPU kernels, and by tools/benchmark/sanitize_cuda.sh on a GPU.
"""

import itertools
import sys

import torch

import mmvmamba.ops
from mmvmamba.ops import (
    SCAN_MODES,
    add_layer_norm,
    conv2d_channel_last,
    cross_merge,
    cross_scan,
    depthwise_conv_silu,
    layer_norm,
    linear,
    mlp,
    selective_scan,
    ss2d_scan,
    ssd_scan,
)

DEVICE = sys.argv[1] if len(sys.argv) > 1 else 'cpu'
DTYPES = (torch.float32, torch.float16, torch.bfloat16, *((torch.float64,) if DEVICE == 'cpu' else ()))


def scan(batch, groups, channels, states, length, dtype, full):
    state = torch.float64 if dtype == torch.float64 else torch.float32
    dim = groups * channels
    leaf = lambda kind, *shape: torch.randn(shape, device=DEVICE).to(kind).requires_grad_()  # noqa: E731
    options = dict(D=leaf(state, dim), delta_bias=leaf(state, dim), delta_softplus=True) if full else {}
    out = selective_scan(
        leaf(dtype, batch, dim, length),
        leaf(dtype, batch, dim, length),
        -leaf(state, dim, states).abs(),
        leaf(dtype, batch, groups, states, length),
        leaf(dtype, batch, groups, states, length),
        out_dtype=dtype if dtype == torch.float64 or not full else torch.float32,
        backend=DEVICE,
        **options,
    )
    out.sum().backward()


def layers():
    """The fused layers around the scan."""

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()

    cases = 0
    for dtype, (batch, height, width, channels) in itertools.product(
        DTYPES[:3], ((1, 1, 1, 8), (2, 5, 3, 13), (3, 7, 5, 40), (2, 33, 20, 96), (1, 9, 130, 264))
    ):
        x, branch = draw(batch, height, width, channels), draw(batch, height, width, channels, dtype=dtype)
        weight, bias, factors = draw(channels), draw(channels), torch.rand(batch, device=DEVICE)
        total, y = add_layer_norm(x, branch, weight, bias, out_dtype=dtype, factors=factors)
        y = depthwise_conv_silu(y, draw(channels, 1, 3, 3), draw(channels))
        hidden = 3 * channels
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            y = linear(y, draw(channels, channels))
            y = mlp(y, draw(hidden, channels), draw(hidden), draw(channels, hidden), draw(channels))
        y = conv2d_channel_last(y, draw(16, channels, 3, 3), draw(16), stride=2, padding=1)
        (total.sum() + y.float().sum()).backward()
        cases += 5
    return cases


def core(channels, height, width, rank, dtype, scan_mode):
    for states in (1, 2, 16) if DEVICE == 'cuda' else (1, 2):
        shapes = ((2, channels, height, width), (4, rank + 2 * states, channels), (4, channels, rank), (4, channels))
        leaves = [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]
        shapes = ((4 * channels, states), (4 * channels,))
        leaves += [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
        ss2d_scan(*leaves, scan_mode, backend=DEVICE).float().sum().backward()
        with torch.no_grad():
            ss2d_scan(*leaves, scan_mode, backend=DEVICE)


def mamba2():
    """The scan of Mamba-2, whose kernels are Triton's."""
    cases = 0
    for dtype, d_state, channels, size in itertools.product(
        DTYPES, (16, 64, 128), (8, 16, 64), ((1, 1), (7, 7), (5, 13), (17, 19))
    ):
        length = size[0] * size[1]
        shapes = dict(
            x=(2, length, 3, channels), dt=(2, length, 12), B=(2, length, 4, d_state), C=(2, length, 4, d_state)
        )
        leaves = {name: torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for name, shape in shapes.items()}
        A, D, dt_bias = (torch.randn(shape, device=DEVICE).requires_grad_() for shape in (12, (12, channels), 12))
        y = ssd_scan(**leaves, A=-A.abs(), D=D, dt_bias=dt_bias, dt_softplus=True, size=size)
        y.float().sum().backward()
        cases += 1
    return cases


def main():
    torch.manual_seed(0)
    cases = 0
    for dtype, length, channels in itertools.product(DTYPES, (1, 2, 63, 64, 65, 129), (1, 3, 4, 5, 33)):
        scan(2, 2, channels, 1 + cases % 3, length, dtype, full=cases % 2 == 0)
        cases += 1
    for bad in (float('nan'), float('inf'), float('-inf'), 3e38, -3e38, 1e-40):
        value = torch.full((1, 5, 67), bad, device=DEVICE, requires_grad=True)
        ones = torch.ones(1, 1, 2, 67, device=DEVICE)
        selective_scan(
            value, value, -ones[0, 0, :, :5].T, ones, ones, delta_softplus=True, backend=DEVICE
        ).sum().backward()
        selective_scan(ones[:, 0, :1], ones[:, 0, :1], value[0, :1, :2], ones, ones, backend=DEVICE).sum().backward()
        cases += 2
    for dtype, mode, last, (height, width) in itertools.product(
        DTYPES, SCAN_MODES, (False, True), ((1, 1), (1, 7), (5, 3))
    ):
        x = (
            torch.randn((2, height, width, 3) if last else (2, 3, height, width), device=DEVICE)
            .to(dtype)
            .requires_grad_()
        )
        cross_merge(
            cross_scan(x, mode, last, backend=DEVICE), (height, width), mode, last, backend=DEVICE
        ).sum().backward()
        cases += 1
    for dtype, rank, channels, (height, width) in itertools.product(
        DTYPES, (1, 6, 13), (8, 33), ((1, 1), (7, 9), (4, 17), (11, 13), (17, 19))
    ):
        core(channels, height, width, rank, dtype, scan_mode=('cross2d', 'unidi', 'bidi')[cases % 3])
        cases += 1
    if DEVICE == 'cuda':  # these kernels split long sequences and rows otherwise than short ones
        for dtype, states, length in itertools.product(DTYPES, (1, 2, 16), (2047, 2049, 4100)):
            scan(1, 2, 3, states, length, dtype, full=True)
            cases += 1
        for dtype, out, (rows, channels) in itertools.product(
            DTYPES, DTYPES, ((1, 4), (33, 36), (1001, 48), (5, 1024))
        ):
            leaves = [torch.randn(shape, device=DEVICE) for shape in ((rows, channels), (channels,), (channels,))]
            leaves[0] = leaves[0].to(dtype)
            leaves = [leaf.requires_grad_() for leaf in (*leaves, torch.randn(channels, device=DEVICE))]
            layer_norm(*leaves[:3], out_dtype=out).float().sum().backward()
            layer_norm(*leaves[:3], out_dtype=out, shift=leaves[3], gelu=True).float().sum().backward()
            cases += 1
        cases += mamba2()
    cases += layers()
    print(f'{cases} cases through the kernels beside {mmvmamba.ops.__file__}')


if __name__ == '__main__':
    main()

"""The seam at the scan: what steps in between, in which order, and for whom."""

import threading

import pytest
import torch

from mmvmamba.layers import SS2D, SS2DOptions, intercept_scan, scan_routes


def build(scan_mode='cross2d'):
    """An SS2D of 8 channels and its input, (B, C, H, W)."""
    torch.manual_seed(0)
    return SS2D(8, SS2DOptions(scan_mode=scan_mode)).eval(), torch.randn(2, 8, 5, 6)


@pytest.mark.parametrize('scan_mode', ['cross2d', 'unidi', 'bidi', 'cascade2d'])
@torch.no_grad()
def test_every_mode_is_intercepted(scan_mode):
    op, x = build(scan_mode)
    expected, calls = op(x), []

    def record(*arguments):
        calls.append(arguments)
        return scan_routes(*arguments)

    with intercept_scan(record):
        assert torch.equal(op(x), expected)
    assert torch.equal(op(x), expected)
    ((maps, *parameters, mode),) = calls
    assert mode == scan_mode and maps.shape == (2, 8, 5, 6)
    assert maps.is_contiguous(memory_format=torch.channels_last)
    names = ('x_proj_weight', 'dt_projs_weight', 'dt_projs_bias', 'A_logs', 'Ds')
    assert all(value is getattr(op, name) for name, value in zip(names, parameters))


@torch.no_grad()
def test_interceptions_nest():
    op, x = build()
    order = []

    def outer(x, *rest):
        order.append('outer')
        return scan_routes(x, *rest)

    def inner(x, *rest):
        order.append('inner')
        return scan_routes(x, *rest)

    with intercept_scan(outer), intercept_scan(inner), intercept_scan(inner):
        op(x)
    assert order == ['inner', 'inner', 'outer']
    with intercept_scan(outer), pytest.raises(ZeroDivisionError), intercept_scan(lambda *_: 1 // 0):
        op(x)
    op(x)
    assert order == ['inner', 'inner', 'outer']


@torch.no_grad()
def test_other_threads_scan_as_before():
    op, x = build()
    expected, outs = op(x), []
    with intercept_scan(lambda x, *_: torch.zeros_like(x)):
        thread = threading.Thread(target=lambda: outs.append(op(x)))
        thread.start()
        thread.join()
        assert not torch.equal(op(x), expected)
    assert torch.equal(outs[0], expected)


@torch.no_grad()
def test_compiled_scan_sees_the_interception():
    op, x = build()
    compiled = torch.compile(op, backend='eager', fullgraph=True)
    expected = compiled(x)
    torch.testing.assert_close(expected, op(x))
    split = torch.compile(op, backend='eager')
    split(x)
    calls = []

    def record(*arguments):
        calls.append(arguments[-1])
        return scan_routes(*arguments)

    with intercept_scan(record):
        torch.testing.assert_close(split(x), expected)
    assert calls == ['cross2d']
    assert torch.equal(compiled(x), expected)

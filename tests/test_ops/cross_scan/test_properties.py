"""Any arguments of cross_scan and cross_merge give the exact result, or one error that names the argument."""

import torch
from hypothesis import strategies as st

from mmvmamba.ops import SCAN_MODES, cross_merge, cross_scan
from tests.cases import cases
from tests.test_ops.op_inputs import (
    DEVICES,
    DTYPES,
    ELSEWHERE,
    FAULTS,
    LAYOUTS,
    assert_refused,
    broken,
    lay_out,
)

MAPS = dict(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    device=st.sampled_from(DEVICES),
    layout=st.sampled_from(LAYOUTS),
    scan_mode=st.sampled_from(SCAN_MODES),
)


@cases(quick=80, full=1000, **MAPS, channel_last=st.booleans())
def test_cross_scan_and_merge_are_exact(batch, channels, height, width, dtype, device, layout, scan_mode, channel_last):
    pixels = torch.arange(batch * channels * height * width).remainder(251).to(device, dtype)
    x = lay_out(
        pixels.view((batch, height, width, channels) if channel_last else (batch, channels, height, width)), layout
    )
    scanned = cross_scan(x, scan_mode, channel_last)
    assert torch.equal(scanned, cross_scan(x, scan_mode, channel_last, backend='naive'))
    merged = cross_merge(lay_out(scanned, layout), (height, width), scan_mode, channel_last)
    expected = 4 * (x if layout != 'overlapping' else x[:1].expand(x.shape)).double()
    assert torch.equal(merged.double(), expected.to(dtype).double())


@cases(
    quick=60,
    full=600,
    **{**MAPS, 'scan_mode': st.sampled_from(('cross2d', 'diagonal', '', None, 3, ('cross2d',)))},
    fault=st.sampled_from((None, *FAULTS)),
    axis=st.integers(0, 3),
    size=st.sampled_from((None, 'swapped', (0, 0), (-1, -4), 'ab', (2.0, 3), (1, 2, 3), [2])),
)
def test_cross_ops_refuse(batch, channels, height, width, dtype, device, layout, scan_mode, fault, axis, size):
    x = torch.ones(batch, channels, height, width, dtype=dtype, device=device)
    y = torch.ones(batch, 4, channels, height * width, dtype=dtype, device=device)
    true_size = (height, width)
    # broken along an axis that the op cannot know, a map stays a map
    if fault == 'dtype' or (fault == 'size' and axis in (0, 2)) or fault in ELSEWHERE:
        fault = None
    if fault is not None:
        x = broken(x, fault, axis) if fault != 'size' else x
        y = broken(y, fault, axis)
    if fault not in (None, 'size') or scan_mode != 'cross2d':
        assert_refused(cross_scan, dict(x=x, scan_mode=scan_mode))
    else:
        cross_scan(x, scan_mode)
    size = true_size if size in (None, 'swapped') else size
    if fault is not None or scan_mode != 'cross2d' or size != true_size:
        assert_refused(cross_merge, dict(y=y, size=size, scan_mode=scan_mode))
    else:
        assert cross_merge(y, size, scan_mode).shape == (batch, channels, height, width)

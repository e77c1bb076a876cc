"""Cross-scan and cross-merge on a GPU, in CUDA and in Triton, against the naive backend."""

import pytest
import torch

from mmvmamba.ops import SCAN_MODES, cross_merge, cross_scan
from tests.test_ops.scan_inputs import ROUNDING, relative_error
from tests.test_ops.selective_scan.test_gpu import BACKENDS, DTYPES, ids
from tests.test_ops.selective_scan.test_selective_scan import strided

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU is visible to torch')


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('channel_last', [False, True], ids=['first', 'last'])
@pytest.mark.parametrize('dtype', [*DTYPES, torch.float64], ids=ids)
@pytest.mark.parametrize('scan_mode', SCAN_MODES)
def test_cross_scan(scan_mode, dtype, channel_last, backend):
    for batch, channels, height, width in [(2, 3, 1, 1), (1, 16, 7, 7), (2, 5, 70, 33), (1, 8, 56, 56), (1, 2, 1, 130)]:
        size = (height, width)
        x = torch.randn(batch, channels, *size, device='cuda').to(dtype)
        y = torch.randn(batch, 4, channels, height * width, device='cuda').to(dtype)
        if channel_last:
            x, y = x.permute(0, 2, 3, 1), y.permute(0, 3, 1, 2)
        x, y = strided(x).requires_grad_(), y.clone().requires_grad_()
        scanned = cross_scan(x, scan_mode, channel_last, backend)
        assert torch.equal(scanned, cross_scan(x, scan_mode, channel_last, 'naive'))
        merged = cross_merge(y, size, scan_mode, channel_last, backend)
        expected = cross_merge(y.double(), size, scan_mode, channel_last, 'naive')
        assert relative_error(merged, expected) < 2 * ROUNDING[dtype]
        (dx,) = torch.autograd.grad(scanned, x, y)
        (dy,) = torch.autograd.grad(merged, y, x)
        assert torch.equal(dx, merged) and torch.equal(dy, scanned)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('channel_last', [False, True], ids=['first', 'last'])
@pytest.mark.parametrize('size', [(70000, 70000), (2**15, 2**15), (2**32 + 1, 1)], ids=str)
def test_maps_that_the_kernels_can_not_index_are_refused(size, channel_last, backend):
    """Views of one element, which nothing copies before the error."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float16, device='cuda')
    x, y = one.expand(1, 1, *size), one.expand(1, 4, 1, size[0] * size[1])
    if channel_last:
        x, y = x.permute(0, 2, 3, 1), y.permute(0, 3, 1, 2)
    message = rf'has a map of {size[0]} x {size[1]} pixels, at most \d+ are supported on a GPU'
    with pytest.raises(ValueError, match=f'cross_scan: x {message}'):
        cross_scan(x, channel_last=channel_last, backend=backend)
    with pytest.raises(ValueError, match=f'cross_merge: y {message}'):
        cross_merge(y, size, channel_last=channel_last, backend=backend)

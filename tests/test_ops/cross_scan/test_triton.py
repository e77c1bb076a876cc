"""The Triton kernels at small sizes on CPU, by Triton's interpreter in a process that selective_scan's test starts."""

import pytest
import torch

from tests.test_ops.scan_inputs import relative_error
from tests.test_ops.triton_interpreter import INTERPRETED, patch_interpreter

if INTERPRETED:
    from mmvmamba.ops.cross_scan import naive as cross_naive
    from mmvmamba.ops.cross_scan import triton as cross_triton

    patch_interpreter()

    @pytest.mark.parametrize('channel_last', [False, True], ids=['first', 'last'])
    @pytest.mark.parametrize('mode, scan_mode', list(enumerate(('cross2d', 'unidi', 'bidi', 'cascade2d'))))
    def test_cross_scan(mode, scan_mode, channel_last):
        x = torch.randn((1, 5, 70, 3) if channel_last else (1, 3, 5, 70))
        y = cross_triton.cross_scan(x, mode, channel_last)
        assert torch.equal(y, cross_naive.cross_scan(x, scan_mode, channel_last))
        merged = cross_triton.cross_merge(y, 5, 70, mode, channel_last)
        assert relative_error(merged, cross_naive.cross_merge(y, (5, 70), scan_mode, channel_last)) < 1e-6

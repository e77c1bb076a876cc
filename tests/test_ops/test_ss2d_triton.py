"""The fused Triton core at small sizes on CPU: as an op without a launch, and its kernels by Triton's interpreter."""

import importlib.util

import pytest
import torch

from mmvmamba.ops import ss2d_scan
from mmvmamba.ops.ss2d import triton_op
from tests.test_ops.ss2d_inputs import make_map, make_parameters, relative_error, run
from tests.test_ops.triton_interpreter import INTERPRETED, patch_loop_bounds, run_interpreted

needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='triton is not installed')


@pytest.mark.skipif(INTERPRETED, reason='this is the process that the interpreter runs in')
@needs_triton
def test_in_a_process_with_the_interpreter():
    run_interpreted(__file__)


@needs_triton
@pytest.mark.parametrize('segments', [1, 2, 3, 7, 16, 28, 32, 33, 9600])
@pytest.mark.parametrize('channels', [1, 7, 40, 96, 192, 768])
def test_blocks_cover_an_image_and_no_thread_shares_a_value(segments, channels):
    from mmvmamba.ops.ss2d import triton

    block, width, chain = triton._tile(segments, channels)
    assert block * chain >= segments > block * (chain - 1)
    assert 32 <= block * width <= max(triton.TILE, triton.NARROWEST * block)
    for number in (block, width):
        assert number & (number - 1) == 0


@pytest.mark.parametrize('training', [True, False])
def test_shapes_without_a_launch(training):
    """What torch.compile traces: layouts and dtypes of the op and its backward."""
    x = make_map(2, 12, 5, 6, torch.float16).to('meta')
    parameters = [value.to('meta') for value in make_parameters(12, 3)]
    y, maps, states = torch.ops.mmvmamba.ss2d_scan_triton(x, *parameters, 'cross2d', torch.float32, training)
    assert y.shape == x.shape and y.stride() == x.stride() and y.dtype == torch.float32
    assert maps.shape == (60, 32) and states.shape == (2 * 5 * 4 * 12 if training else 0,)
    gradients = torch.ops.mmvmamba.ss2d_scan_triton_backward(y, x, *parameters, maps, states, 'cross2d')
    for gradient, value in zip(gradients, (x, *parameters)):
        assert gradient.shape == value.shape and gradient.dtype == value.dtype


if INTERPRETED:
    from mmvmamba.ops.ss2d import triton

    patch_loop_bounds()

    NAMES = ('y', 'dx', 'dx_proj_weight', 'ddt_projs_weight', 'ddt_projs_bias', 'dA_logs', 'dDs')
    LIMITS = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 2.4e-2}  # the interpreter cuts bfloat16
    CASES = [
        # batch, channels, height, width, rank, mode, dtype
        (1, 8, 3, 4, 2, 'cross2d', torch.float32),
        (2, 7, 5, 7, 6, 'cross2d', torch.float32),  # chains of blocks, combined in two steps
        (1, 5, 7, 5, 3, 'bidi', torch.float32),
        (1, 5, 5, 7, 3, 'unidi', torch.float32),
        (1, 8, 1, 1, 2, 'cross2d', torch.float32),
        (1, 8, 1, 37, 2, 'cross2d', torch.float32),
        (1, 24, 15, 1, 3, 'cross2d', torch.float32),  # channels: one block and a part
        (1, 9, 3, 3, 24, 'bidi', torch.float32),
        (1, 16, 6, 7, 6, 'cross2d', torch.float16),
        (1, 16, 6, 7, 24, 'unidi', torch.bfloat16),
    ]

    @pytest.fixture(autouse=True)
    def _small_blocks(monkeypatch):
        """Small blocks, and chains above 4 segments: the interpreter walks every element of a scan."""
        monkeypatch.setattr(triton, 'TILE', 32)
        monkeypatch.setattr(triton, 'NARROWEST', 8)
        monkeypatch.setattr(triton, 'BLOCK_SEGMENTS', 2)
        monkeypatch.setattr(triton, 'LONE_SEGMENTS', 4)
        monkeypatch.setattr(triton, 'COMBINED', 2)

    def fused(mode, out_dtype=None):
        return lambda x, *parameters: triton_op.ss2d_scan(x, *parameters, mode, out_dtype or x.dtype, True)

    @pytest.mark.parametrize('case', CASES, ids=str)
    def test_output_and_every_gradient(case):
        *shape, dt_rank, mode, dtype = case
        x, dy = make_map(*shape, dtype), make_map(*shape, dtype, seed=2)
        parameters = make_parameters(shape[1], dt_rank)
        expected = run(
            lambda *values: ss2d_scan(*values, mode, backend='naive'),
            x.double(),
            [value.double() for value in parameters],
            dy.double(),
        )
        for name, value, reference in zip(NAMES, run(fused(mode), x, parameters, dy), expected):
            assert relative_error(value, reference) < LIMITS[dtype], name

    def test_contiguous_map_float_output_and_no_states():
        x, parameters = make_map(1, 8, 4, 5, torch.float16), make_parameters(8, 2)
        y = fused('cross2d', torch.float32)(x, *parameters)
        assert y.dtype == torch.float32 and y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(fused('cross2d', torch.float32)(x.contiguous(), *parameters), y)
        without, _, states = torch.ops.mmvmamba.ss2d_scan_triton(x, *parameters, 'cross2d', torch.float32, False)
        assert torch.equal(without, y) and states.numel() == 0

    def test_nan_passes_on_and_stays_in_its_image():
        x, parameters = make_map(2, 8, 4, 5), make_parameters(8, 2)
        expected = fused('cross2d')(x, *parameters)
        x[0, :, 1, 2] = float('nan')
        y = fused('cross2d')(x, *parameters)
        assert y[0].isnan().all() and torch.equal(y[1], expected[1])

    def test_is_a_well_behaved_op():
        x, parameters = make_map(1, 8, 2, 3).requires_grad_(), [p.requires_grad_() for p in make_parameters(8, 2)]
        torch.library.opcheck(torch.ops.mmvmamba.ss2d_scan_triton.default, (x, *parameters, 'unidi', x.dtype, True))

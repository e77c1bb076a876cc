"""The fused Triton core at small sizes on CPU: as an op without a launch, and its kernels by Triton's interpreter."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from mmvmamba.ops import SCAN_MODES, ss2d_scan
from mmvmamba.ops.ss2d.tiling import TILINGS
from tests.test_ops.ss2d_inputs import make_map, make_parameters, relative_error, run
from tests.test_ops.triton_interpreter import INTERPRETED, patch_interpreter, run_interpreted

needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='triton is not installed')
not_interpreted = pytest.mark.skipif(INTERPRETED, reason='this is the process that the interpreter runs in')


@not_interpreted
@needs_triton
@pytest.mark.parametrize('slow', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['quick', 'slow'])
def test_in_a_process_with_the_interpreter(slow):
    run_interpreted(__file__, slow=slow)


@pytest.mark.parametrize('kind', TILINGS)
@pytest.mark.parametrize('segments', [1, 2, 3, 7, 16, 28, 32, 33, 9600])
@pytest.mark.parametrize('channels', [1, 7, 40, 96, 192, 768])
def test_blocks_cover_an_image_and_no_thread_shares_a_value(segments, channels, kind):
    tiling = TILINGS[kind]
    length = segments * tiling.segment
    (block, _, width), chain = tiling.tile(length, channels), tiling.chain(length)
    assert block * chain >= segments > block * (chain - 1)
    if chain > 1:
        number, steps, _ = tiling.carry_tile(length, channels)
        assert number * steps == block * tiling.segment
    assert 32 <= block * width <= max(tiling.elements, tiling.narrowest * block)
    for number in (block, width):
        assert number & (number - 1) == 0


@not_interpreted
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    'size, d_state, columns, saved', [((5, 6), 1, 8, 5), ((5, 6), 16, 40, 0), ((15, 14), 3, 16, 8)], ids=str
)
def test_shapes_without_a_launch(size, d_state, columns, saved, training):
    """What torch.compile traces: layouts and dtypes of the op and its backward."""
    x = make_map(2, 12, *size, torch.float16).to('meta')
    parameters = [value.to('meta') for value in make_parameters(12, 3, d_state)]
    y, projections, states = torch.ops.mmvmamba.ss2d_scan_triton(x, *parameters, 0, True, training)
    assert y.shape == x.shape and y.stride() == x.stride() and y.dtype == torch.float32
    assert projections.shape == (2 * size[0] * size[1], 4 * columns)
    assert states.shape == (2 * saved * 4 * d_state * 12 if training else 0,)
    gradients = torch.ops.mmvmamba.ss2d_scan_triton_backward(y, x, *parameters, projections, states, 0)
    for gradient, value in zip(gradients, (x, *parameters)):
        assert gradient.shape == value.shape and gradient.dtype == value.dtype


if INTERPRETED:
    from mmvmamba.ops.ss2d import triton_problem, triton_states

    patch_interpreter()

    NAMES = ('y', 'dx', 'dx_proj_weight', 'ddt_projs_weight', 'ddt_projs_bias', 'dA_logs', 'dDs')
    LIMITS = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 2.4e-2}  # the interpreter cuts bfloat16
    TRUE_SEGMENT = TILINGS['one'].segment
    CASES = [
        # batch, channels, height, width, rank, mode, dtype, pixels of a segment
        (1, 8, 2, 5, 2, 'cross2d', torch.float32, 3),
        (1, 5, 7, 2, 3, 'bidi', torch.float32, 3),
        (1, 8, 1, 1, 2, 'cross2d', torch.float32, 3),
        (1, 12, 7, 1, 3, 'cross2d', torch.float32, 3),  # channels: one block and a part
        (1, 8, 2, 7, 13, 'unidi', torch.bfloat16, 3),
    ]
    LONG_CASES = [
        (2, 7, 2, 7, 6, 'cross2d', torch.float32, 3),  # chains of blocks
        (1, 5, 4, 7, 3, 'cross2d', torch.float32, 3),  # combined in two steps
        (1, 5, 3, 11, 2, 'cross2d', torch.float32, TRUE_SEGMENT),
        (1, 5, 2, 7, 3, 'unidi', torch.float32, 3),
        (1, 8, 1, 14, 2, 'cross2d', torch.float32, 3),
        (1, 9, 2, 2, 24, 'bidi', torch.float32, 3),
        (1, 8, 2, 7, 6, 'cross2d', torch.float16, 3),
    ]
    # and N: the kernels loop over states; some images at a time
    STATES_CASES = [
        (1, 8, 2, 5, 2, 2, 'cross2d', torch.float32, 3),
        (1, 5, 1, 13, 3, 2, 'bidi', torch.float16, 3),
    ]
    LONG_STATES_CASES = [
        (1, 8, 1, 1, 2, 16, 'cross2d', torch.float32, 3),
        (3, 7, 2, 7, 6, 2, 'cross2d', torch.float32, 3),
        (1, 5, 4, 7, 3, 8, 'cross2d', torch.float32, 3),
        (1, 5, 3, 11, 2, 16, 'cross2d', torch.float32, TRUE_SEGMENT),
        (1, 5, 2, 7, 3, 4, 'unidi', torch.float32, 3),
        (1, 9, 2, 2, 24, 5, 'bidi', torch.float32, 3),
        (1, 8, 2, 7, 13, 2, 'unidi', torch.bfloat16, 3),
        (1, 3, 2, 2, 2, 64, 'cross2d', torch.float32, 3),
    ]
    ALL_CASES = [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in LONG_CASES)]
    ALL_STATES_CASES = [*STATES_CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in LONG_STATES_CASES)]

    def set_segment(monkeypatch, pixels):
        for kind, tiling in TILINGS.items():
            small = replace(tiling, segment=pixels, block=4, lone=4, elements=32, narrowest=8)
            monkeypatch.setitem(TILINGS, kind, small)

    @pytest.fixture(autouse=True)
    def _small_blocks(monkeypatch):
        """Short segments, small blocks, and chains above 4 segments: the interpreter takes a millisecond a step."""
        set_segment(monkeypatch, 3)
        monkeypatch.setattr(triton_problem, 'COMBINED', 2)
        monkeypatch.setattr(triton_states, 'PIECE', 2 * 7 * 2 * 7)

    def fused(mode, out_dtype=None):
        index, op = SCAN_MODES.index(mode), torch.ops.mmvmamba.ss2d_scan_triton

        def run(x, *parameters):
            return op(x, *(t.float() for t in parameters), index, (out_dtype or x.dtype) == torch.float32, True)[0]

        return run

    def check_output_and_every_gradient(shape, dt_rank, d_state, mode, dtype, segment, monkeypatch):
        set_segment(monkeypatch, segment)
        x, dy = make_map(*shape, dtype), make_map(*shape, dtype, seed=2)
        parameters = make_parameters(shape[1], dt_rank, d_state)
        expected = run(
            lambda *values: ss2d_scan(*values, mode, backend='naive'),
            x.double(),
            [value.double() for value in parameters],
            dy.double(),
        )
        for name, value, reference in zip(NAMES, run(fused(mode), x, parameters, dy), expected):
            assert relative_error(value, reference) < LIMITS[dtype], name

    @pytest.mark.parametrize('case', ALL_CASES, ids=str)
    def test_output_and_every_gradient(case, monkeypatch):
        *shape, dt_rank, mode, dtype, segment = case
        check_output_and_every_gradient(shape, dt_rank, 1, mode, dtype, segment, monkeypatch)

    @pytest.mark.parametrize('case', ALL_STATES_CASES, ids=str)
    def test_several_states(case, monkeypatch):
        *shape, dt_rank, d_state, mode, dtype, segment = case
        check_output_and_every_gradient(shape, dt_rank, d_state, mode, dtype, segment, monkeypatch)

    @pytest.mark.parametrize('d_state', [1, 2])
    def test_contiguous_map_float_output_and_no_states(d_state):
        x, parameters = make_map(1, 8, 2, 5, torch.float16), make_parameters(8, 2, d_state)
        y = fused('cross2d', torch.float32)(x, *parameters)
        assert y.dtype == torch.float32 and y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(fused('cross2d', torch.float32)(x.contiguous(), *parameters), y)
        without, _, states = torch.ops.mmvmamba.ss2d_scan_triton(x, *parameters, 0, True, False)
        assert torch.equal(without, y) and states.numel() == 0

    @pytest.mark.parametrize('d_state', [1, 2])
    def test_nan_passes_on_and_stays_in_its_image(d_state):
        x, parameters = make_map(2, 8, 2, 5), make_parameters(8, 2, d_state)
        expected = fused('cross2d')(x, *parameters)
        x[0, :, 1, 2] = float('nan')
        y = fused('cross2d')(x, *parameters)
        assert y[0].isnan().all() and torch.equal(y[1], expected[1])

    @pytest.mark.slow
    @pytest.mark.parametrize('size, d_state', [((2, 3), 1), ((2, 7), 2)], ids=str)
    def test_is_a_well_behaved_op(size, d_state):
        x = make_map(1, 8, *size).requires_grad_()
        parameters = [value.requires_grad_() for value in make_parameters(8, 2, d_state)]
        torch.library.opcheck(torch.ops.mmvmamba.ss2d_scan_triton.default, (x, *parameters, 1, True, True))

"""The fused core on a GPU, in CUDA and in Triton: against float64 on the naive backend, and what it is as an op."""

import logging

import pytest
import torch

from mmvmamba.ops import backend_report, ss2d_scan
from mmvmamba.ops.ss2d import interface
from tests.test_ops.ss2d_inputs import make_map, make_parameters, relative_error, run

BACKENDS = [
    pytest.param(status.name, marks=pytest.mark.skipif(not status.available, reason=status.reason))
    for status in backend_report()
    if status.name in ('cuda', 'triton')
]
OPS = dict(cuda='ss2d_scan', triton='ss2d_scan_triton')

LIMITS = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
# batch, channels, height, width, rank, mode
CASES = [
    (2, 96, 14, 14, 6, 'cross2d'),
    (2, 96, 14, 14, 6, 'unidi'),
    (2, 96, 14, 14, 6, 'bidi'),
    (1, 32, 1, 1, 2, 'cross2d'),
    (1, 32, 1, 37, 2, 'cross2d'),
    (1, 40, 53, 1, 3, 'cross2d'),
    (3, 33, 7, 5, 6, 'cross2d'),
    (1, 7, 3, 3, 1, 'bidi'),
    (2, 192, 28, 28, 12, 'cross2d'),
    (2, 384, 14, 14, 24, 'cross2d'),
    (2, 768, 7, 7, 48, 'cross2d'),
    (2, 128, 14, 14, 8, 'cross2d'),
    (2, 48, 9, 14, 16, 'bidi'),
    (1, 64, 7, 9, 64, 'cross2d'),
    (1, 40, 11, 11, 24, 'cross2d'),  # the largest images that one block takes, in backward
    (1, 40, 14, 16, 24, 'cross2d'),  # and in forward
    (1, 33, 15, 14, 30, 'bidi'),
    (1, 40, 14, 14, 70, 'cross2d'),  # maps that leave no room for two such blocks
    (2, 64, 8, 16, 4, 'unidi'),
    (2, 100, 19, 23, 17, 'unidi'),
    (1, 40, 120, 61, 3, 'cross2d'),  # chains too long to wait for
    (1, 40, 120, 61, 20, 'cross2d'),
]
# batch, channels, height, width, rank, mode, N: several states a channel
STATES_CASES = [
    *((2, 96, 14, 14, 6, mode, states) for states in (2, 4, 8, 16) for mode in ('cross2d', 'unidi', 'bidi')),
    (1, 32, 1, 1, 2, 'cross2d', 16),
    (1, 32, 1, 37, 2, 'cross2d', 16),
    (1, 40, 53, 1, 3, 'cross2d', 8),
    (3, 33, 7, 5, 6, 'cross2d', 2),
    (1, 7, 3, 3, 1, 'bidi', 3),
    (2, 192, 28, 28, 6, 'cross2d', 16),
    (2, 384, 14, 14, 24, 'cross2d', 16),  # two blocks of groups in backward, dt by a GEMM
    (2, 768, 7, 7, 48, 'cross2d', 16),
    (64, 224, 7, 7, 12, 'cross2d', 16),  # 7 groups, of which a block has 4
    (140, 64, 12, 14, 4, 'cross2d', 16),  # an image is one block
    (140, 64, 12, 14, 4, 'unidi', 4),
    (1, 40, 120, 61, 3, 'cross2d', 16),  # long chains
    (1, 100, 19, 23, 17, 'unidi', 11),
    (1, 40, 14, 14, 70, 'bidi', 5),
]

# and for Triton, which compiles for each kind of map and each multiple of 16: some of each kind
TRITON_STATES_CASES = [
    *(
        (2, 96, 14, 14, 6, mode, states)
        for states, mode in ((2, 'cross2d'), (4, 'unidi'), (8, 'bidi'), (16, 'cross2d'))
    ),
    *((2, 96, 7, 7, 6, 'cross2d', states) for states in (3, 16, 64)),
    (1, 32, 1, 1, 2, 'cross2d', 16),
    (1, 40, 53, 1, 3, 'cross2d', 8),
    (3, 33, 7, 5, 6, 'cross2d', 2),
    (2, 384, 14, 14, 24, 'cross2d', 16),
    (2, 768, 7, 7, 48, 'cross2d', 16),
    (1, 40, 120, 61, 3, 'cross2d', 16),  # long chains
    (1, 100, 19, 23, 17, 'unidi', 11),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


cuda_only, triton_only = (
    pytest.mark.parametrize('backend', [param for param in BACKENDS if param.values == (name,)], indirect=True)
    for name in ('cuda', 'triton')
)


def fused(backend, mode, out_dtype=None):
    return lambda *values: ss2d_scan(*values, mode, out_dtype=out_dtype, backend=backend)


def check_output_and_every_gradient(case, dtype, backend, d_state=1):
    *shape, dt_rank, mode = case
    x, dy = make_map(*shape, dtype, 'cuda'), make_map(*shape, dtype, 'cuda', seed=2)
    parameters = make_parameters(shape[1], dt_rank, d_state, device='cuda')
    reference = run(
        lambda *values: ss2d_scan(*values, mode, backend='naive'),
        x.double(),
        [value.double() for value in parameters],
        dy.double(),
    )
    results = run(fused(backend, mode), x, parameters, dy)
    names = ('y', 'dx', 'dx_proj_weight', 'ddt_projs_weight', 'ddt_projs_bias', 'dA_logs', 'dDs')
    for name, value, expected in zip(names, results, reference):
        assert relative_error(value, expected) < LIMITS[dtype], name
    for first, second in zip(results, run(fused(backend, mode), x, parameters, dy)):
        assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(fused(backend, mode)(x, *parameters), results[0])


@pytest.mark.parametrize('dtype', LIMITS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize('case', CASES, ids=str)
def test_output_and_every_gradient(case, dtype, backend):
    check_output_and_every_gradient(case, dtype, backend)


@cuda_only
@pytest.mark.parametrize('dtype', LIMITS, ids=lambda dtype: str(dtype)[6:])
def test_a_rank_whose_maps_leave_room_for_few_segments(dtype, backend):
    """A block takes fewer than 8 segments, lest it need more shared memory than there is."""
    check_output_and_every_gradient((1, 8, 12, 12, 400, 'cross2d'), dtype, backend)


@cuda_only
@pytest.mark.parametrize('dtype', LIMITS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize('case', STATES_CASES, ids=str)
def test_several_states(case, dtype, backend):
    *case, states = case
    check_output_and_every_gradient(case, dtype, backend, states)


@triton_only
@pytest.mark.parametrize('dtype', LIMITS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize('case', TRITON_STATES_CASES, ids=str)
def test_several_states_in_triton(case, dtype, backend):
    *case, states = case
    check_output_and_every_gradient(case, dtype, backend, states)


@triton_only
def test_several_states_of_some_images_at_a_time(backend, monkeypatch):
    from mmvmamba.ops.ss2d import triton_states

    monkeypatch.setattr(triton_states, 'PIECE', 2 * 96 * 14 * 14)
    check_output_and_every_gradient((5, 96, 14, 14, 6, 'cross2d'), torch.float16, backend, 4)


def test_several_states_as_an_op(backend):
    """Contiguous maps, float output, another stream, CUDA graphs, torch.compile, and the op's own checks."""
    x, dy = (make_map(2, 64, 14, 15, torch.float16, 'cuda', seed=seed) for seed in (1, 2))
    parameters = make_parameters(64, 4, 16, device='cuda')
    expected = run(fused(backend, 'cross2d'), x, parameters, dy)
    y = fused(backend, 'cross2d', torch.float32)(x, *parameters)
    assert y.dtype == torch.float32 and relative_error(y, expected[0]) < 1e-3
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        results = run(fused(backend, 'cross2d'), x.contiguous().clone(), parameters, dy.contiguous())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(fused(backend, 'cross2d'), x, parameters, dy)
    graph.replay()
    compiled = run(torch.compile(fused(backend, 'cross2d'), fullgraph=True), x, parameters, dy)
    for value, *others in zip(expected, results, replayed, compiled):
        assert all(torch.equal(value, other) for other in others)
    leaves = [value.float().requires_grad_() for value in (x[:, :, :5, :6], *parameters)]
    torch.library.opcheck(getattr(torch.ops.mmvmamba, OPS[backend]).default, (*leaves, 0, True, True))


def test_several_states_in_float_output_add_up_in_float(backend):
    """The four routes of a half-precision map meet in a float output without a rounding to half between them."""
    x, parameters = make_map(2, 64, 14, 14, torch.float16, 'cuda'), make_parameters(64, 4, 16, device='cuda')
    y = fused(backend, 'cross2d', torch.float32)(x, *parameters)
    expected = ss2d_scan(x.double(), *(value.double() for value in parameters), backend='naive')
    assert relative_error(y, expected) < LIMITS[torch.float16]


def test_contiguous_maps_and_float_output(backend):
    x, dy = make_map(2, 64, 9, 11, torch.float16, 'cuda'), make_map(2, 64, 9, 11, torch.float16, 'cuda', seed=2)
    parameters = make_parameters(64, 4, device='cuda')
    expected = run(fused(backend, 'cross2d'), x, parameters, dy)
    for value, reference in zip(run(fused(backend, 'cross2d'), x.contiguous(), parameters, dy.contiguous()), expected):
        assert torch.equal(value, reference)
    y = fused(backend, 'cross2d', torch.float32)(x, *parameters)
    assert y.dtype == torch.float32 and relative_error(y, expected[0]) < 1e-3


def test_more_than_2_to_the_31_elements(backend):
    shape = (65600, 64, 23, 23)
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip('needs a GPU with 40 GiB of memory')
    parameters = make_parameters(64, 4, device='cuda')
    images = make_map(2, *shape[1:], torch.float16, 'cuda')
    x = images[:1].permute(0, 2, 3, 1).expand(shape[0], 23, 23, 64).contiguous().permute(0, 3, 1, 2)
    x[-1] = images[1]
    assert x.numel() > 2**31
    with torch.no_grad():
        y = fused(backend, 'cross2d')(x, *parameters)
        expected = fused(backend, 'cross2d')(images, *parameters)
    for index, image in ((0, 0), (shape[0] // 2, 0), (-2, 0), (-1, 1)):
        torch.testing.assert_close(y[index], expected[image], rtol=2e-3, atol=2e-3)


def test_autocast_runs_the_core_in_half_precision(backend):
    x, parameters = make_map(1, 32, 6, 6, device='cuda'), make_parameters(32, 2, device='cuda')
    with torch.autocast('cuda', torch.float16):
        assert ss2d_scan(x, *parameters, backend=backend).dtype == torch.float16


def test_larger_states_are_composed_and_said_once(caplog, monkeypatch, backend):
    monkeypatch.setattr(interface, '_announced', set())
    states = interface.MOST_STATES[backend] + 1
    x, parameters = make_map(1, 8, 5, 5, device='cuda'), make_parameters(8, 2, states, device='cuda')
    with caplog.at_level(logging.INFO, logger='mmvmamba.ops'):
        y = ss2d_scan(x, *parameters, backend=backend)
        ss2d_scan(x, *parameters, backend=backend)
    assert sum('composed' in record.message for record in caplog.records) == 1
    assert relative_error(y, ss2d_scan(x, *parameters, backend='naive')) < 1e-5


def test_moves_no_map_to_another_layout(backend):
    x = make_map(4, 64, 16, 16, torch.float16, 'cuda')
    parameters = make_parameters(64, 4, device='cuda')
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        y = fused(backend, 'cross2d')(x, *parameters)
        torch.cuda.synchronize()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not [event.key for event in profile.key_averages() if 'copy' in event.key.lower()]


def test_is_a_well_behaved_op(backend):
    x = make_map(2, 32, 5, 6, device='cuda').requires_grad_()
    parameters = [value.requires_grad_() for value in make_parameters(32, 2, device='cuda')]
    op = getattr(torch.ops.mmvmamba, OPS[backend]).default
    torch.library.opcheck(op, (x, *parameters, 0, True, True))


@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_into_one_graph(dynamic, backend):
    parameters = make_parameters(32, 2, device='cuda')

    def function(x, *parameters):
        return torch.relu(ss2d_scan(torch.sin(x), *parameters, backend=backend))

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for size in ((6, 7), (9, 5)):
        x, dy = make_map(2, 32, *size, device='cuda'), make_map(2, 32, *size, device='cuda', seed=2)
        for value, expected in zip(run(compiled, x, parameters, dy), run(function, x, parameters, dy)):
            assert relative_error(value, expected) < 1e-5


@pytest.mark.parametrize('size', [(14, 14), (30, 23)], ids=str)
def test_cuda_graph_and_side_stream(size, backend):
    """Forward and backward on a stream of their own, then replayed from a graph on new values."""
    x, dy = (make_map(2, 64, *size, torch.float16, 'cuda', seed=seed) for seed in (1, 2))
    parameters = make_parameters(64, 4, device='cuda')
    expected = run(fused(backend, 'cross2d'), x, parameters, dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = x.clone()
        results = run(fused(backend, 'cross2d'), late, parameters, dy)
    torch.cuda.current_stream().wait_stream(stream)
    for value, reference in zip(results, expected):
        assert torch.equal(value, reference)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(fused(backend, 'cross2d'), x, parameters, dy)
    x.mul_(1.1)
    graph.replay()
    for value, reference in zip(results, run(fused(backend, 'cross2d'), x, parameters, dy)):
        assert torch.equal(value, reference)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_on_a_gpu_that_is_not_the_current_one(backend):
    x, dy, parameters = make_map(2, 64, 30, 23), make_map(2, 64, 30, 23, seed=2), make_parameters(64, 4)
    expected = run(fused(backend, 'cross2d'), x.cuda(), [value.cuda() for value in parameters], dy.cuda())
    values = run(fused(backend, 'cross2d'), x.to('cuda:1'), [v.to('cuda:1') for v in parameters], dy.to('cuda:1'))
    for value, reference in zip(values, expected):
        assert value.device.index == 1 and torch.equal(value.cpu(), reference.cpu())


@pytest.mark.parametrize('offset', [1, 2, 8])
def test_maps_at_any_alignment(offset, backend):
    """Triton compiles for the alignment of its pointers, and its layouts follow."""
    storage = torch.empty(2 * 14 * 14 * 64 + offset, dtype=torch.float16, device='cuda')
    x, dy = (make_map(2, 64, 14, 14, torch.float16, 'cuda', seed=seed) for seed in (1, 2))
    shifted = storage[offset:].view(2, 14, 14, 64).permute(0, 3, 1, 2)
    shifted.copy_(x)
    parameters = make_parameters(64, 4, device='cuda')
    expected = run(fused(backend, 'cross2d'), x, parameters, dy)
    for value, reference in zip(run(fused(backend, 'cross2d'), shifted, parameters, dy), expected):
        assert relative_error(value, reference) < 2e-3

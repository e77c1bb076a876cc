"""layer_norm and add_layer_norm: torch's numbers in the dtype that was asked for."""

import pytest
import torch
import torch.nn.functional as F

from mmvmamba.ops import add_layer_norm, backend_report, layer_norm
from mmvmamba.ops.fused.layer_norm.registration import OUTPUT_TYPES
from tests.test_ops.ss2d_inputs import relative_error, run

OPS = torch.ops.mmvmamba
STATUS = {status.name: status for status in backend_report()}
CUDA = STATUS['cuda']
needs_cpu = pytest.mark.skipif(not STATUS['cpu'].available, reason=STATUS['cpu'].reason)
LIMITS = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


def make_inputs(rows, channels, dtype=torch.float32, device='cpu'):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(rows, channels, generator=generator) + 1
    weight, bias, dy = (torch.randn(*shape, generator=generator) for shape in ((channels,), (channels,), x.shape))
    return x.to(device, dtype), [weight.to(device), bias.to(device)], dy.to(device)


def test_naive_is_torchs_own():
    x, (weight, bias), _ = make_inputs(5, 12)
    expected = F.layer_norm(x, (12,), weight, bias, 1e-3)
    assert torch.equal(layer_norm(x, weight, bias, 1e-3, backend='naive'), expected)
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-3), expected)
    assert layer_norm(x, weight, bias, out_dtype=torch.bfloat16).dtype == torch.bfloat16


def after_conv(x, weight, bias, shift=None, gelu=False):
    """What ``layer_norm`` does after a convolution, in steps."""
    y = F.layer_norm(x if shift is None else x + shift, x.shape[-1:], weight, bias)
    return F.gelu(y) if gelu else y


@pytest.mark.parametrize('gelu', [False, True])
@pytest.mark.parametrize('shifted', [False, True])
def test_naive_after_a_convolution_is_the_steps(shifted, gelu):
    x, (weight, bias), dy = make_inputs(5, 12)
    shift = dy[0] if shifted else None
    y = layer_norm(x, weight, bias, shift=shift, gelu=gelu, backend='naive')
    assert torch.equal(y, after_conv(x, weight, bias, shift, gelu))


CPU_DTYPES = (torch.float32, torch.bfloat16)
by_cpu_dtypes = pytest.mark.parametrize(
    'dtypes', [(a, b) for a in CPU_DTYPES for b in CPU_DTYPES], ids=lambda pair: f'{pair}'.replace('torch.', '')
)


@needs_cpu
@by_cpu_dtypes
@pytest.mark.parametrize('gelu', [False, True])
@pytest.mark.parametrize('shifted', [False, True])
@pytest.mark.parametrize('shape', [(1, 2), (33, 37), (700, 96), (5, 1100), (9, 30)], ids=str)
def test_cpu_output_and_gradients(shape, shifted, gelu, dtypes):
    x, parameters, dy = make_inputs(*shape, dtypes[0])
    parameters += [torch.linspace(-1, 2, shape[1])] * shifted

    def op(x, weight, bias, shift=None):
        return layer_norm(x, weight, bias, 1e-5, dtypes[1], shift, gelu, backend='cpu')

    dy = dy.to(dtypes[1])
    results, again = (run(op, x, parameters, dy) for _ in range(2))
    expected = run(
        lambda *values: after_conv(*values, gelu=gelu), x.double(), [p.double() for p in parameters], dy.double()
    )
    assert results[0].dtype == dtypes[1] and results[1].dtype == dtypes[0]
    # two channels have a gradient of 0, but for eps
    limit = 1e-3 if shape[1] == 2 else 2 * max(LIMITS[dtypes[0]], LIMITS[dtypes[1]])
    for value, truth, second in zip(results, expected, again):
        assert torch.equal(value, second)
        assert relative_error(value, truth) < limit or (value - truth).abs().max() < 2e-2 * (shape[1] == 2)
    with torch.no_grad():
        assert torch.equal(op(x, *parameters), results[0])


@needs_cpu
def test_cpu_rows_do_not_depend_on_each_other_or_on_strides():
    x, parameters, dy = make_inputs(300, 40)
    expected = run(layer_norm, x, parameters, dy)
    other = run(layer_norm, x.t().contiguous().t(), parameters, dy.repeat_interleave(2, 1)[:, ::2])
    assert all(torch.equal(value, second) for value, second in zip(expected, other))
    few = layer_norm(torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)[200:207], *parameters)
    assert torch.equal(few, expected[0][200:207])
    x[3, 7] = float('nan')
    y = layer_norm(x, *parameters)
    assert y[3].isnan().all() and torch.equal(y[4:], expected[0][4:])


@needs_cpu
@pytest.mark.parametrize('shifted', [False, True])
def test_is_a_well_behaved_op_on_a_cpu(shifted):
    x, parameters, dy = make_inputs(10, 20)
    x, weight, bias = (value.requires_grad_() for value in (x, *parameters))
    shift = torch.ones(20, requires_grad=True) if shifted else None
    output_type = OUTPUT_TYPES.index(torch.float32)
    torch.library.opcheck(OPS.layer_norm.default, (x, shift, weight, bias, 1e-5, output_type, shifted, True))
    samples = [value.view(2, 5, 20) for value in (x, dy)]
    factors = torch.ones(2) if shifted else None
    torch.library.opcheck(OPS.add_layer_norm.default, (*samples, factors, weight, bias, 1e-5, True))
    values = [value.detach() for value in (*samples, weight)]
    total, _, statistics = OPS.add_layer_norm(*values[:2], factors, values[2], values[2], 1e-5, True)
    tests = ('test_schema', 'test_faketensor')
    arguments = (samples[1], samples[1], total, factors, values[2], statistics)
    torch.library.opcheck(OPS.add_layer_norm_backward.default, arguments, test_utils=tests)


def test_bad_options_after_a_convolution():
    x, (weight, bias), _ = make_inputs(5, 12)
    with pytest.raises(ValueError, match=r'layer_norm: shift has shape \(11,\), expected \(12,\)'):
        layer_norm(x, weight, bias, shift=torch.ones(11))
    with pytest.raises(TypeError, match="layer_norm: gelu is 'exact', expected True or False"):
        layer_norm(x, weight, bias, gelu='exact')


@pytest.mark.parametrize(
    'eps',
    [float('inf'), float('nan'), -1e-5, 10**400, -(10**400), 10**5000],
    ids=['inf', 'nan', 'negative', 'huge', 'minus_huge', 'unprintable'],
)
def test_bad_eps(eps):
    x, (weight, bias), _ = make_inputs(5, 12)
    with pytest.raises(ValueError, match=r'layer_norm: eps is .*, expected a number from 0 to 1\.79'):
        layer_norm(x, weight, bias, eps)


@pytest.mark.skipif(not CUDA.available, reason=CUDA.reason)
@pytest.mark.parametrize(
    'dtypes', [(a, b) for a in LIMITS for b in LIMITS], ids=lambda pair: f'{pair}'.replace('torch.', '')
)
@pytest.mark.parametrize('shape', [(1, 4), (33, 36), (1001, 48), (777, 96), (257, 192), (65, 384), (20, 1024), (9, 30)])
def test_gpu_output_and_gradients(shape, dtypes):
    x, parameters, dy = make_inputs(*shape, dtypes[0], 'cuda')
    dy = dy.to(dtypes[1])
    results = run(lambda x, w, b: layer_norm(x, w, b, 1e-5, dtypes[1]), x, parameters, dy)
    reference = run(
        lambda x, w, b: F.layer_norm(x, shape[1:], w, b), x.double(), [p.double() for p in parameters], dy.double()
    )
    assert results[0].dtype == dtypes[1] and results[1].dtype == dtypes[0]
    for value, expected in zip(results, reference):
        assert relative_error(value, expected) < max(LIMITS[dtypes[0]], LIMITS[dtypes[1]])
    for first, second in zip(results, run(lambda x, w, b: layer_norm(x, w, b, 1e-5, dtypes[1]), x, parameters, dy)):
        assert torch.equal(first, second)


@pytest.mark.skipif(not CUDA.available, reason=CUDA.reason)
@pytest.mark.parametrize('gelu', [False, True])
@pytest.mark.parametrize('shifted', [False, True])
@pytest.mark.parametrize(
    'dtypes', [(a, b) for a in LIMITS for b in LIMITS], ids=lambda pair: f'{pair}'.replace('torch.', '')
)
@pytest.mark.parametrize('shape', [(1, 4), (33, 36), (1001, 48), (777, 96), (65, 384), (50, 768), (20, 1024), (9, 30)])
def test_gpu_after_a_convolution(shape, dtypes, shifted, gelu):
    x, parameters, dy = make_inputs(*shape, dtypes[0], 'cuda')
    if shifted:
        parameters.append(torch.linspace(-1, 2, shape[1], device='cuda'))
    dy = dy.to(dtypes[1])

    def op(x, weight, bias, shift=None):
        return layer_norm(x, weight, bias, 1e-5, dtypes[1], shift, gelu)

    results, again = (run(op, x, parameters, dy) for _ in range(2))
    expected = run(
        lambda *values: after_conv(*values, gelu=gelu), x.double(), [p.double() for p in parameters], dy.double()
    )
    assert results[0].dtype == dtypes[1] and results[1].dtype == dtypes[0]
    for value, truth, second in zip(results, expected, again):
        assert relative_error(value, truth) < max(LIMITS[dtypes[0]], LIMITS[dtypes[1]])
        assert torch.equal(value, second)


@pytest.mark.skipif(not CUDA.available, reason=CUDA.reason)
@pytest.mark.parametrize('shifted', [False, True])
def test_is_a_well_behaved_op(shifted):
    x, parameters, _ = make_inputs(10, 32, device='cuda')
    x, weight, bias = (value.requires_grad_() for value in (x, *parameters))
    shift = torch.ones(32, device='cuda', requires_grad=True) if shifted else None
    arguments = (x, shift, weight, bias, 1e-5, OUTPUT_TYPES.index(torch.float32), shifted, True)
    torch.library.opcheck(torch.ops.mmvmamba.layer_norm.default, arguments)


def sum_inputs(samples, rows, channels, dtype, device):
    x, parameters, dy = make_inputs(samples * rows, channels, device=device)
    branch = torch.randn(samples, rows, channels, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    factors = torch.tensor([0.0, 1.25] * samples, device=device)[:samples]
    return x.view_as(branch), branch, parameters, dy.view_as(branch), factors


def reference_sum(x, branch, weight, bias, factors):
    total = x + (branch if factors is None else factors.view(-1, 1, 1).to(branch) * branch)
    return total, F.layer_norm(total, x.shape[-1:], weight, bias)


def run_sum(function, tensors, factors, dsum, dy):
    """Both outputs and the gradients of x, branch, weight and bias."""
    leaves = [value.detach().requires_grad_() for value in tensors]
    outputs = function(*leaves, factors)
    grads = [grad.to(out.dtype) for grad, out in zip((dsum, dy), outputs)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def test_naive_sum_is_torchs_own():
    x, branch, (weight, bias), _, factors = sum_inputs(3, 2, 12, torch.float32, 'cpu')
    for chosen in (None, factors):
        results = add_layer_norm(x, branch, weight, bias, factors=chosen, backend='naive')
        for value, expected in zip(results, reference_sum(x, branch, weight, bias, chosen)):
            assert torch.equal(value, expected)


@needs_cpu
@pytest.mark.parametrize('drop', [False, True])
@pytest.mark.parametrize(
    'dtypes',
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=lambda pair: f'{pair}'.replace('torch.', ''),
)
@pytest.mark.parametrize('shape', [(1, 1, 3), (3, 11, 37), (7, 143, 96)], ids=str)
def test_cpu_sum_and_gradients(shape, dtypes, drop):
    x, branch, (weight, bias), dy, factors = sum_inputs(*shape, dtypes[1], 'cpu')
    x, dsum, factors = x.to(dtypes[0]), torch.randn(shape).to(dtypes[0]), factors if drop else None

    def op(x, branch, weight, bias, factors):
        return add_layer_norm(x, branch, weight, bias, 1e-5, dtypes[1], factors, backend='cpu')

    tensors = (x, branch, weight, bias)
    results, again = (run_sum(op, tensors, factors, dsum, dy) for _ in range(2))
    doubles = [value.double() for value in (*tensors, dsum, dy.to(dtypes[1]))]
    expected = run_sum(reference_sum, doubles[:4], factors, *doubles[4:])
    assert [value.dtype for value in results[:4]] == [dtypes[0], dtypes[1], dtypes[0], dtypes[1]]
    limit = 2 * max(LIMITS[dtype] for dtype in dtypes)
    for value, truth, second in zip(results, expected, again):
        assert torch.equal(value, second)
        assert relative_error(value, truth) < limit
    for outputs in ((0,), (1,)):  # either output alone
        leaves = [value.detach().requires_grad_() for value in tensors]
        ours = torch.autograd.grad([op(*leaves, factors)[i].sum() for i in outputs], leaves, allow_unused=True)
        exact = [value.detach().double().requires_grad_() for value in tensors]
        truth = torch.autograd.grad(
            [reference_sum(*exact, factors)[i].sum() for i in outputs], exact, allow_unused=True
        )
        for value, known in zip(ours[:2], truth):
            assert (value.double() - known).abs().max() <= 8 * limit * (1 + known.abs().max())


@pytest.mark.parametrize(
    'change, error, message',
    [
        (dict(branch=torch.ones(3, 2, 11)), ValueError, r'branch has shape \(3, 2, 11\), expected \(3, 2, 12\)'),
        (dict(factors=torch.ones(2)), ValueError, r'factors has shape \(2,\), expected \(3,\)'),
        (dict(factors=1.0), TypeError, r'factors must be a tensor of shape \(B\), got float'),
        (dict(out_dtype=torch.int8), TypeError, r'out_dtype is int8'),
    ],
)
def test_bad_sums(change, error, message):
    x, branch, (weight, bias), _, factors = sum_inputs(3, 2, 12, torch.float32, 'cpu')
    arguments = dict(x=x, branch=branch, weight=weight, bias=bias, factors=factors)
    with pytest.raises(error, match=f'add_layer_norm: {message}'):
        add_layer_norm(**{**arguments, **change})


@pytest.mark.skipif(not CUDA.available, reason=CUDA.reason)
@pytest.mark.parametrize('drop', [False, True])
@pytest.mark.parametrize(
    'dtypes',
    [(torch.float32, half) for half in LIMITS] + [(half, half) for half in (torch.float16, torch.bfloat16)],
    ids=lambda pair: f'{pair}'.replace('torch.', ''),
)
@pytest.mark.parametrize('shape', [(1, 1, 4), (3, 11, 36), (7, 143, 96), (5, 400, 192), (5, 13, 384), (4, 5, 1024)])
def test_gpu_sum_and_gradients(shape, dtypes, drop):
    x, branch, parameters, dy, factors = sum_inputs(*shape, dtypes[1], 'cuda')
    tensors, dsum = (x.to(dtypes[0]), branch, *parameters), torch.randn_like(dy)
    factors = factors if drop else None

    def op(x, branch, weight, bias, factors):
        return add_layer_norm(x, branch, weight, bias, 1e-5, dtypes[1], factors)

    results, again = (run_sum(op, tensors, factors, dsum.to(dtypes[0]), dy.to(dtypes[1])) for _ in range(2))
    doubles = [value.double() for value in tensors]
    expected = run_sum(reference_sum, doubles, factors, dsum.to(dtypes[0]).double(), dy.to(dtypes[1]).double())
    assert [value.dtype for value in results[:4]] == [*dtypes, *dtypes]
    for value, truth, second in zip(results, expected, again):
        assert relative_error(value, truth) < max(LIMITS[dtypes[0]], LIMITS[dtypes[1]])
        assert torch.equal(value, second)


@pytest.mark.skipif(not CUDA.available, reason=CUDA.reason)
def test_sum_is_a_well_behaved_op():
    x, branch, parameters, _, factors = sum_inputs(3, 4, 32, torch.float16, 'cuda')
    leaves = [value.requires_grad_() for value in (x, branch, *parameters)]
    arguments = (*leaves[:2], factors, *leaves[2:], 1e-5, True)
    torch.library.opcheck(torch.ops.mmvmamba.add_layer_norm.default, arguments)
    only_sum = torch.ops.mmvmamba.add_layer_norm(*arguments)[0]
    dx, dbranch = torch.autograd.grad(only_sum.sum(), leaves[:2])
    assert (dx == 1).all() and torch.equal(dbranch, factors.half().view(3, 1, 1).expand_as(branch))

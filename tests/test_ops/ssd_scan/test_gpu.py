"""The Triton kernels of the Mamba-2 scan on a GPU, against the matrix products in float64."""

import pytest
import torch

from mmvmamba import VSSMBackbone
from mmvmamba.ops import backend_report, ssd_scan
from tests.test_ops.ssd_inputs import NAMES, draw_gradients, make_ssd_inputs, relative_error, run_ssd

STATUS = {status.name: status for status in backend_report()}
pytestmark = pytest.mark.skipif(not STATUS['triton'].available, reason=STATUS['triton'].reason)
# of products: float32 with all digits, 16-bit ones with rounded operands
LIMITS = {torch.float32: (5e-6, 5e-5), torch.float16: (2e-3, 4e-3), torch.bfloat16: (1.6e-2, 3.2e-2)}


def on_gpu(inputs):
    return {name: None if value is None else value.cuda() for name, value in inputs.items()}


def assert_close(result, truth, dtype):
    for name, expected in truth.items():
        error = relative_error(result[name].cpu(), expected)
        limit = LIMITS[dtype][name.startswith('d')]
        assert error < limit, f'{name}: relative error {error:.2e}, limit {limit:.2e}'


@pytest.mark.parametrize('dtype', LIMITS, ids=str)
@pytest.mark.parametrize('optional', [True, False], ids=['full', 'bare'])
@pytest.mark.parametrize(
    'd_state, channels, length',
    [(16, 16, 1), (64, 16, 49), (64, 32, 333), (128, 64, 197), (64, 16, 3136), (128, 128, 70)],
)
def test_against_float64(d_state, channels, length, optional, dtype):
    shape = dict(length=length, heads=6, channels=channels, groups=2, d_state=d_state, optional=optional)
    inputs = make_ssd_inputs(dtype=dtype, **shape)
    grads = draw_gradients(inputs)
    exact = {name: None if value is None else value.double() for name, value in inputs.items()}
    truth = run_ssd(exact, *(grad.double() for grad in grads), backend='cpu')
    result = run_ssd(on_gpu(inputs), *(grad.cuda() for grad in grads), backend='triton')
    assert_close(result, truth, dtype)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('size', [(56, 56), (7, 7), (13, 29), (1, 40)], ids=str)
@pytest.mark.parametrize('scan_mode', ['cross2d', 'unidi', 'bidi'])
def test_routes(scan_mode, size, dtype):
    inputs = make_ssd_inputs(
        length=size[0] * size[1], heads=24, channels=16, groups=4, d_state=64, routes=4, dtype=dtype
    )
    grads = draw_gradients(inputs)
    options = dict(size=size, scan_mode=scan_mode)
    exact = {name: value.double() for name, value in inputs.items()}
    truth = run_ssd(exact, *(grad.double() for grad in grads), backend='cpu', **options)
    result = run_ssd(on_gpu(inputs), *(grad.cuda() for grad in grads), backend='triton', **options)
    assert_close(result, truth, dtype)
    again = run_ssd(on_gpu(inputs), *(grad.cuda() for grad in grads), **options)  # auto takes triton
    assert all(torch.equal(result[name], again[name]) for name in result)


def test_opcheck():
    values = [value.requires_grad_() for value in on_gpu(make_ssd_inputs(length=70, d_state=16, channels=16)).values()]
    torch.library.opcheck(torch.ops.mmvmamba.ssd_scan_triton.default, (*values, True, False, True, 0, 0, -1))


def test_the_gradient_of_views_of_one_tensor():
    """As the model gives them: dt, B and C are parts of one projection."""
    inputs = on_gpu(make_ssd_inputs(length=49, heads=8, groups=4, routes=4, channels=16, d_state=16))
    maps = torch.cat([inputs[name].flatten(2) for name in ('dt', 'B', 'C')], dim=2).requires_grad_()
    dt, B, C = maps.split([8, 64, 64], dim=2)
    parts = dict(inputs, dt=dt, B=B.unflatten(2, (4, 16)), C=C.unflatten(2, (4, 16)))
    ssd_scan(**parts, dt_softplus=True, size=(7, 7)).square().sum().backward()
    leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES}
    ssd_scan(**leaves, dt_softplus=True, size=(7, 7)).square().sum().backward()
    expected = torch.cat([leaves[name].grad.flatten(2) for name in ('dt', 'B', 'C')], dim=2)
    torch.testing.assert_close(maps.grad, expected)


@pytest.mark.parametrize('train', [False, True], ids=['inference', 'training'])
def test_a_model_in_mixed_precision_compiled(train):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = VSSMBackbone('tiny-m2', drop_path_rate=0.0).cuda().train(train)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 3, 224, 224, device='cuda')
    with torch.set_grad_enabled(train), torch.autocast('cuda', torch.float16):
        outs, expected = compiled(x), model(x)
    for out, reference in zip(outs, expected):
        assert relative_error(out.cpu(), reference.cpu()) < 1e-2
    if train:
        sum(out.float().square().mean() for out in outs).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

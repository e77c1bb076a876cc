"""Callers as projects write them: inside autograd functions and ops of ``torch.library``, compiled, cast, pickled."""

import pickle

import pytest
import torch

from mmvmamba.ops import selective_scan
from tests.test_compat.callers import GatedScan, Layer, OflexScan, make_library_op
from tests.test_ops.scan_inputs import make_scan_inputs, relative_error

# earlier ones were not tried: their compiler may run such a function between two graphs
WHOLE_GRAPH = tuple(int(n) for n in torch.__version__.split('.')[:2]) >= (2, 14)
ORDER = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')
pytestmark = pytest.mark.usefixtures('names')


def make_inputs(device='cpu', length=131, d_state=2, **sizes):
    inputs = make_scan_inputs(d_state=d_state, length=length, device=device, **(sizes or dict(channels=4)))
    return [inputs[key].requires_grad_() for key in ORDER]


def gradients(function, inputs, *more):
    out = function(*inputs, *more)
    out = out[0] if isinstance(out, tuple) else out
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def agree(results, expected, limit=1e-5):
    assert len(results) == len(expected)
    for value, wanted in zip(results, expected):
        assert value.shape == wanted.shape and relative_error(value, wanted) < limit


def test_autograd_functions(device):
    inputs = make_inputs(device)
    z = torch.randn_like(inputs[0]).requires_grad_()
    agree(gradients(OflexScan.apply, inputs, True), gradients(selective_scan, inputs, True))
    gated = [*inputs[:6], z, inputs[6]]
    out, last_state = GatedScan.apply(*gated)
    expected, last = selective_scan(*inputs, True, z=z, return_last_state=True)
    assert relative_error(last_state, last) < 1e-6 and not last_state.requires_grad
    results = [out, *torch.autograd.grad(out.sum(), gated)]
    agree(results, [expected, *torch.autograd.grad(expected.sum(), gated)])


def test_gradients_by_finite_differences():
    inputs = [t.detach().double().requires_grad_() for t in make_inputs(length=3, batch=1, groups=1, channels=2)]
    assert torch.autograd.gradcheck(lambda *t: OflexScan.apply(*t, True), inputs)


@pytest.mark.parametrize('length', [49, 131, 2049])
def test_an_op_of_torch_library_with_the_usual_fake_kernels(length, fast_device):
    torch._dynamo.reset()  # each case compiles the same function for another op
    op = make_library_op(f'caller_{fast_device}_{length}')
    inputs = make_inputs(fast_device, length)
    agree(gradients(op, inputs), gradients(selective_scan, inputs, True))
    with torch.no_grad():
        torch.library.opcheck(op, inputs, test_utils=('test_schema', 'test_faketensor'))
    compiled = torch.compile(lambda *t: op(*t)[0] * 2, backend='aot_eager', fullgraph=True)
    agree(gradients(compiled, inputs), gradients(lambda *t: selective_scan(*t, True) * 2, inputs))


def test_compiled_around_an_autograd_function(fast_device):
    inputs = make_inputs(fast_device)

    def twice(*tensors):
        return OflexScan.apply(*tensors, True) * 2

    compiled = torch.compile(twice, backend='aot_eager', fullgraph=WHOLE_GRAPH)
    agree(gradients(compiled, inputs), gradients(twice, inputs))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    layer, u = Layer().to(device), torch.randn(2, 4, 49, device=device, requires_grad=True)
    expected = gradients(layer, [u])
    with torch.autocast(device, dtype=dtype):
        results = gradients(lambda t: layer(t.to(dtype)), [u])
    assert results[0].dtype == torch.float32
    agree(results, expected, 3e-2)


def test_custom_fwd_and_bwd_of_amp(device):
    class Cast(torch.autograd.Function):
        forward = staticmethod(torch.amp.custom_fwd(OflexScan.forward, device_type=device, cast_inputs=torch.float32))
        backward = staticmethod(torch.amp.custom_bwd(OflexScan.backward, device_type=device))

    inputs = make_inputs(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = gradients(Cast.apply, inputs, True)
    agree(results, gradients(selective_scan, inputs, True))


def test_a_model_pickles_and_goes_on(clean):
    from mmvmamba import compat

    compat.install()
    from mamba_ssm import Mamba

    model = torch.nn.Sequential(Mamba(8), Mamba(8))
    again = pickle.loads(pickle.dumps(model))
    x = torch.randn(2, 5, 8)
    assert torch.equal(again(x), model(x))


def test_checkpointing_and_saved_tensors_on_cpu(device):
    inputs = make_inputs(device)
    expected = gradients(selective_scan, inputs, True)
    checkpointed = lambda *t: torch.utils.checkpoint.checkpoint(OflexScan.apply, *t, True, use_reentrant=False)  # noqa: E731
    agree(gradients(checkpointed, inputs), expected)
    with torch.autograd.graph.save_on_cpu():  # which copies x, and its carries are computed again
        results = gradients(OflexScan.apply, inputs, True)
    agree(results, expected)


def test_second_derivatives_are_refused_by_name():
    inputs = make_inputs()
    (du,) = torch.autograd.grad(OflexScan.apply(*inputs, True).sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"selective_scan: second derivatives.*backend='naive' has them"):
        du.square().sum().backward()


def test_second_derivatives_of_the_naive_backend(monkeypatch):
    monkeypatch.setenv('MMVMAMBA_BACKEND', 'naive')
    inputs = [t.detach().double().requires_grad_() for t in make_inputs(length=3, batch=1, groups=1, channels=2)]
    assert torch.autograd.gradgradcheck(lambda *t: OflexScan.apply(*t, True), inputs)

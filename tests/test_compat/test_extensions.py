"""``fwd`` and ``bwd`` of each compiled name beside the float64 truth."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmvmamba.compat import carries
from mmvmamba.ops import selective_scan, use_backend
from tests.test_ops.scan_inputs import make_scan_inputs, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LIMIT = {torch.float32: 5e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-11}
LENGTHS = [1, 49, 131]
ORDER = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')
pytestmark = pytest.mark.usefixtures('names')


class Ops(TorchDispatchMode):
    """The names of mmvmamba's ops that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == 'mmvmamba':
            self.seen.append(function._schema.name.partition('::')[2])
        return function(*args, **(kwargs or {}))


def leaf(tensor):
    return None if tensor is None else tensor.detach().double().requires_grad_()


def truth(inputs, dout, z=None, states=False):
    """Output, last state and gradients by the naive backend in float64."""
    leaves = {name: leaf(t) for name, t in inputs.items()}
    gate = leaf(z)
    out, last = selective_scan(
        **leaves, delta_softplus=True, z=gate, return_last_state=True, backend='naive'
    )  # fmt: skip
    wanted = [t for t in (*leaves.values(), gate) if t is not None]
    grads = iter(torch.autograd.grad(out, wanted, dout.double()))
    result = {'d' + name: next(grads) if t is not None else None for name, t in leaves.items()}
    return out.detach(), last, result, next(grads, None)


def hold(gradients, expected, dtype):
    """Hold gradients in order to the truth by name."""
    assert len(gradients) == len(expected)
    for (name, wanted), value in zip(expected.items(), gradients):
        if wanted is None:
            assert value is None, name
        else:
            assert value.shape == wanted.shape, name
            assert relative_error(value, wanted) < LIMIT[dtype], name


def inputs_for(dtype, device, length, d_state=2, groups=2, optional=True):
    return make_scan_inputs(
        d_state=d_state, length=length, groups=groups, channels=4, dtype=dtype, device=device, optional=optional
    )


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('name', ['core', 'nrow', 'oflex'])
def test_core(name, dtype, length, device):
    module = importlib.import_module(f'selective_scan_cuda_{name}')
    inputs = inputs_for(dtype, device, length, d_state=1 if name == 'oflex' else 3)
    more = (True,) if name == 'oflex' else ()
    arguments = tuple(inputs[key] for key in ORDER)
    out, x = module.fwd(*arguments, True, 1, *more)
    dout = torch.randn_like(out)
    expected, last, grads, _ = truth(inputs, dout)
    assert out.dtype == (torch.float32 if more else dtype)
    assert relative_error(out, expected) < LIMIT[dtype]
    assert x.dtype == torch.float32 and x.is_contiguous()
    assert x.shape == (*out.shape[:2], -(-length // 2048), 2 * last.shape[2])
    assert relative_error(x[:, :, -1, 1::2], last) < LIMIT[torch.float32] * 4
    result = module.bwd(*arguments, dout, x, True, 1)
    hold(result, grads, dtype)
    assert [g.dtype for g in result] == [t.dtype for t in arguments]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('shared', [1, 2, 4])
def test_oflex_shares_delta_and_rounds_on_demand(shared, dtype, device):
    import selective_scan_cuda_oflex as module

    inputs = inputs_for(dtype, device, 131)
    inputs['delta'] = inputs['delta'][:, ::shared].contiguous()
    arguments = tuple(inputs[key] for key in ORDER)
    out, x = module.fwd(*arguments, True, 1, False)
    assert out.dtype == dtype
    dout = torch.randn_like(out)
    expected, _, grads, _ = truth(inputs, dout)
    assert relative_error(out, expected) < LIMIT[dtype]
    hold(module.bwd(*arguments, dout, x, True, 1), grads, dtype)


@pytest.mark.parametrize('gate', [True, False])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('length, form', [(49, 'groups'), (131, 'one'), (131, 'constant')])
def test_mamba(length, form, dtype, gate, device):
    import selective_scan_cuda as module

    inputs = inputs_for(dtype, device, length, groups=2 if form == 'groups' else 1)
    if form == 'one':
        inputs['B'], inputs['C'] = inputs['B'][:, 0], inputs['C'][:, 0]
    elif form == 'constant':
        inputs['B'], inputs['C'] = -inputs['A'].clone(), inputs['C'][:, 0]
    z = inputs['u'].flip(1).contiguous() if gate else None
    u, delta, A, B, C, D, bias = (inputs[key] for key in ORDER)
    out, x, *rest = module.fwd(u, delta, A, B, C, D, z, bias, True)
    dout = torch.randn_like(out)
    expected, _, grads, grad_z = truth(inputs, dout, z)
    assert len(rest) == gate
    assert relative_error(rest[0] if gate else out, expected) < LIMIT[dtype]
    given = torch.full_like(u, 7.0) if gate else None
    result = module.bwd(u, delta, A, B, C, D, z, bias, dout, x, out, given, True, gate)
    hold(result[:7], grads, dtype)
    assert len(result) == (9 if gate else 7)
    if gate:
        assert result[7] is given and relative_error(given, grad_z) < LIMIT[dtype]
        assert relative_error(result[8], rest[0]) < LIMIT[dtype]
        again = module.bwd(u, delta, A, B, C, D, z, bias, dout, x, out, None, True, False)
        assert len(again) == 8 and torch.equal(again[7], given)


@pytest.mark.parametrize('length', [49, 131])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_ndstate(dtype, length, device):
    import selective_scan_cuda_ndstate as module

    inputs = inputs_for(dtype, device, length, d_state=1)
    flat = dict(inputs, A=inputs['A'][:, 0], B=inputs['B'][:, :, 0], C=inputs['C'][:, :, 0])
    arguments = tuple(flat[key] for key in ORDER)
    out, x = module.fwd(*arguments, True, 1)
    dout = torch.randn_like(out)
    expected, last, grads, _ = truth(inputs, dout)
    assert relative_error(out, expected) < LIMIT[dtype]
    assert relative_error(x[:, :, -1, 1::2], last) < 2e-4
    grads = {name: g.reshape(flat[name[1:]].shape) for name, g in grads.items()}
    hold(module.bwd(*arguments, dout, x, True, 1), grads, dtype)
    with pytest.raises(ValueError, match=r'ndstate: A must have the dimensions \(dim\), got \(8, 1\)'):
        module.fwd(*(inputs[key] for key in ORDER), True, 1)


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('d_state', [1, 3])
def test_states(d_state, dtype, length, device):
    import selective_scan_cuda_oflex_rh as module

    inputs = inputs_for(dtype, device, length, d_state=d_state)
    u, delta, A, B, _, D, bias = (inputs[key] for key in ORDER)
    states, x = module.fwd(u, delta, A, B, D, bias, True, 1, True)
    assert states.shape == (*u.shape[:2], d_state, length) and states.dtype == torch.float32
    assert module.fwd(u, delta, A, B, None, bias, True, 1, False)[0].dtype == dtype
    dout = torch.randn_like(states)
    expected, last, grads, _ = truth(dict(inputs, C=None, D=None), dout)
    assert relative_error(states, expected) < LIMIT[dtype]
    assert relative_error(x[:, :, -1, 1::2], last) < 2e-4
    with Ops() as ops:
        du, ddelta, dA, dB, dD, dbias = module.bwd(u, delta, A, B, D, bias, dout, x, True, 1)
    assert 'selective_scan' not in ops.seen and 'selective_scan_triton' not in ops.seen
    wanted = {name: grads[name] for name in ('du', 'ddelta', 'dA', 'dB', 'ddelta_bias')}
    hold([du, ddelta, dA, dB, dbias], wanted, dtype)
    assert not dD.any() and dD.shape == D.shape


def test_without_D_and_bias_their_gradients_are_None(device):
    import selective_scan_cuda_core as module

    inputs = inputs_for(torch.float32, device, 49, optional=False)
    arguments = tuple(inputs[key] for key in ORDER)
    out, x = module.fwd(*arguments, True, 1)
    _, _, grads, _ = truth(inputs, torch.ones_like(out))
    hold(module.bwd(*arguments, torch.ones_like(out), x, True, 1), grads, torch.float32)


@pytest.mark.parametrize('backend', ['cpu', 'naive'])
def test_float64(backend):
    import selective_scan_cuda_core as module

    inputs = inputs_for(torch.float64, 'cpu', 131)
    arguments = tuple(inputs[key] for key in ORDER)
    with use_backend(backend):
        out, x = module.fwd(*arguments, True, 1)
        result = module.bwd(*arguments, torch.ones_like(out), x, True, 1)
    expected, _, grads, _ = truth(inputs, torch.ones_like(out))
    assert relative_error(out, expected) < 1e-12
    hold(result, grads, torch.float64)


@pytest.mark.parametrize('length', [49, 131, 2049])  # of 2048 steps callers see one chunk, of more two
def test_carries_go_with_x_and_a_copy_of_x_costs_a_second_forward(length, fast_device):
    import selective_scan_cuda_oflex as module

    inputs = inputs_for(torch.float32, fast_device, length)
    arguments = tuple(inputs[key] for key in ORDER)
    out, x = module.fwd(*arguments, True, 1, True)
    dout = torch.randn_like(out)
    assert x.shape[2] == (2 if length > 2048 else 1) and x.is_contiguous()
    forwards = []
    results = []
    for given in (x, x.detach(), x.clone(), None):
        with Ops() as ops:
            results.append(module.bwd(*arguments, dout, given, True, 1))
        forwards.append(sum(name in ('selective_scan', 'selective_scan_triton') for name in ops.seen))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    assert forwards[:2] == [0, 0] and forwards[2] <= 1 and forwards[3] == 1


@pytest.mark.parametrize('saved, length', [(2, 40), (3, 100), (34, 2100)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_carries_are_laid_out_alike_with_and_without_the_extension(saved, length, dtype, monkeypatch):
    states = torch.randn(2, 3, saved, 4, dtype=dtype)
    states[:, :, 0] = 0
    compiled = carries.pack(states, length)
    monkeypatch.setattr(carries, '_compiled_pack', lambda: None)
    plain = carries.pack(states, length)
    for x in (compiled, plain):
        assert x.shape == (2, 3, -(-length // 2048), 8) and x.is_contiguous() and x.storage_offset() == 0
        assert torch.equal(x[:, :, -1, 1::2], states[:, :, -1])
        assert torch.equal(carries.unpack(x, saved), states)
    assert carries.unpack(plain.clone(), saved) is None or saved == 2


def test_nothing_is_recorded_for_autograd_and_inputs_stay(device):
    import selective_scan_cuda_oflex as module

    inputs = {name: t.requires_grad_() for name, t in inputs_for(torch.float32, device, 49).items()}
    before = {name: t.detach().clone() for name, t in inputs.items()}
    out, x = module.fwd(*(inputs[key] for key in ORDER), True, 1, True)
    assert not out.requires_grad and not x.requires_grad
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


@pytest.mark.parametrize(
    'change, error, message',
    [
        (dict(A=torch.ones(8, 2, dtype=torch.complex64)), NotImplementedError, 'A is complex.*real A'),
        (dict(A=torch.ones(8, 2).half()), TypeError, 'A is float16, expected float32'),
        (dict(B=torch.ones(2, 2, 2, 49).half()), TypeError, 'B is float16, but u is float32; they must agree'),
        (dict(delta=torch.ones(2, 3, 49)), ValueError, 'delta has 3 channels but u has 8'),
        (dict(D=torch.ones(7)), ValueError, r'D has shape \(7,\), expected \(8,\)'),
        (dict(u=[1.0]), TypeError, 'u must be a tensor'),
        (dict(C=None), TypeError, 'C must be a tensor'),
    ],
)
def test_wrong_arguments(change, error, message):
    import selective_scan_cuda_core as module

    arguments = {**inputs_for(torch.float32, 'cpu', 49), **change}
    with pytest.raises(error, match='selective_scan_cuda_core: ' + message):
        module.fwd(*(arguments[key] for key in ORDER), True, 1)


X = (2, 8, 1, 4)


@pytest.mark.parametrize(
    'x, error, message',
    [
        (5, TypeError, 'x must be a tensor'),
        (torch.zeros(0), ValueError, r'x has shape \(0,\), expected \(2, 8, 1, 4\)'),
        *(
            (torch.zeros(shape), ValueError, r'x has shape .*, expected \(2, 8, 1, 4\)')
            for shape in ((1, *X[1:]), (2, 7, 1, 4), (2, 8, 1, 6), (2, 8, 5, 4), X[:3])
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize('name', ['core', 'oflex_rh'])
def test_an_x_that_is_not_what_forward_returned(name, x, error, message, device):
    """Of another batch it would be read past its end."""
    module = importlib.import_module(f'selective_scan_cuda_{name}')
    inputs = inputs_for(torch.float32, device, 49)
    arguments = [inputs[key] for key in ORDER if key != 'C' or name == 'core']
    dout = torch.ones_like(inputs['u']) if name == 'core' else torch.ones(2, 8, 2, 49, device=device)
    x = x.to(device) if isinstance(x, torch.Tensor) else x
    with pytest.raises(error, match=f'selective_scan_cuda_{name}: {message}'):
        module.bwd(*arguments, dout, x, True, 1)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize('length', [49, 300])
def test_an_x_of_another_dtype_is_a_copy(dtype, length, device):
    """Such as of hooks that pack saved tensors."""
    import selective_scan_cuda_core as module

    arguments = [inputs_for(torch.float32, device, length)[key] for key in ORDER]
    out, x = module.fwd(*arguments, True, 1)
    expected = module.bwd(*arguments, torch.ones_like(out), x, True, 1)
    for value, wanted in zip(module.bwd(*arguments, torch.ones_like(out), x.to(dtype), True, 1), expected):
        assert relative_error(value, wanted) < 1e-6


@pytest.mark.parametrize('name', ['z', 'dout', 'out', 'dz'])
@pytest.mark.parametrize(
    'value, error', [('text', TypeError), (torch.ones(2, 8, 48), ValueError)], ids=['text', 'short']
)
def test_a_wrong_argument_of_the_gate(name, value, error):
    import selective_scan_cuda as module

    u, delta, A, B, C, D, bias = (inputs_for(torch.float32, 'cpu', 49)[key] for key in ORDER)
    given = {**dict.fromkeys(('z', 'dout', 'out', 'dz'), torch.ones_like(u)), name: value}
    z, dout, out, dz = given.values()
    with pytest.raises(error, match=rf'selective_scan_cuda: {name} (has shape|must be a tensor)'):
        module.bwd(u, delta, A, B, C, D, z, bias, dout, None, out, dz, True, True)

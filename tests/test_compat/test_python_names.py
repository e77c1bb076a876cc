"""The Python names of mamba_ssm and of VMamba's package: equations, gradients, parameter names, refusals."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmvmamba.ops import selective_scan
from tests.test_ops.scan_inputs import make_scan_inputs, relative_error

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU'))]
BATCH, DIM, STATES, RANK, MODEL, WIDTH, LENGTH = 2, 6, 3, 2, 4, 4, 37
pytestmark = pytest.mark.usefixtures('names')


def inner_inputs(device='cpu', dtype=torch.float32):
    """Arguments of ``mamba_inner_fn`` by name."""
    torch.manual_seed(1)
    shapes = dict(
        xz=(BATCH, 2 * DIM, LENGTH), conv1d_weight=(DIM, 1, WIDTH), conv1d_bias=(DIM,),
        x_proj_weight=(RANK + 2 * STATES, DIM), delta_proj_weight=(DIM, RANK), out_proj_weight=(MODEL, DIM),
        out_proj_bias=(MODEL,), A=(DIM, STATES), D=(DIM,), delta_bias=(DIM,), B_proj_bias=(STATES,),
        C_proj_bias=(STATES,),
    )  # fmt: skip
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    values['A'] = -values['A'].exp()
    state = torch.promote_types(dtype, torch.float32)
    return {
        name: t.to(device, state if name in ('A', 'D', 'delta_bias') else dtype).requires_grad_()
        for name, t in values.items()
    }


def inner_truth(inputs, A_b=None, project=True):
    """The mixer written out in float64."""
    i = {name: t.double() for name, t in inputs.items()}
    x, z = i['xz'].chunk(2, dim=1)
    padded = F.pad(x, (WIDTH - 1, 0))
    steps = [(padded[..., t : t + WIDTH] * i['conv1d_weight'][:, 0]).sum(-1) for t in range(LENGTH)]
    u = F.silu(torch.stack(steps, 2) + i['conv1d_bias'][:, None])
    rows = torch.einsum('rd,bdl->brl', i['x_proj_weight'], u)
    delta = torch.einsum('dr,brl->bdl', i['delta_proj_weight'], rows[:, :RANK])
    B = rows[:, RANK : RANK + STATES] + i['B_proj_bias'][:, None]
    C = rows[:, RANK + STATES :] + i['C_proj_bias'][:, None]

    def scan(A, *moving):
        u, delta, B, C, z = moving
        return selective_scan(
            u, delta, A, B[:, None], C[:, None], i['D'], i['delta_bias'], True, backend='naive'
        ) * F.silu(z)  # fmt: skip

    y = scan(i['A'], u, delta, B, C, z)
    if A_b is not None:
        y = y + scan(A_b.double(), *(t.flip(-1) for t in (u, delta, B, C, z))).flip(-1)
    return torch.einsum('md,bdl->blm', i['out_proj_weight'], y) + i['out_proj_bias'] if project else y


def hold(function, truth, inputs, limit=2e-5):
    out, expected = function(), truth()
    dout = torch.randn(out.shape, device=out.device)
    wanted = [t for t in inputs.values() if t.requires_grad]
    results = torch.autograd.grad(out, wanted, dout.to(out.dtype), allow_unused=True)
    grads = torch.autograd.grad(expected, wanted, dout.double(), allow_unused=True)
    assert relative_error(out, expected) < limit
    for name, value, gradient in zip(inputs, results, grads):
        assert (value is None) == (gradient is None), name
        assert value is None or relative_error(value, gradient) < 10 * limit, name


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_inner_functions(dtype, device):
    from mamba_ssm.ops import selective_scan_interface as interface

    inputs = inner_inputs(device, dtype)
    A_b = (inputs['A'] * 0.5).detach().requires_grad_()
    limit = 2e-5 if dtype == torch.float32 else 2e-2
    hold(lambda: interface.mamba_inner_fn(**inputs), lambda: inner_truth(inputs), inputs, limit)
    both = dict(inputs, A_b=A_b)
    hold(lambda: interface.bimamba_inner_fn(**both), lambda: inner_truth(inputs, A_b), both, limit)
    inside = {name: t for name, t in inputs.items() if not name.startswith('out_proj')}
    hold(
        lambda: interface.mamba_inner_fn_no_out_proj(**inside),
        lambda: inner_truth(inputs, project=False),
        inside,
        limit,
    )


def test_inner_functions_by_position_as_forks_call_them():
    from mamba_ssm.ops.selective_scan_interface import bimamba_inner_fn, mamba_inner_fn

    i = inner_inputs()
    first = [i[n] for n in list(i)[:7]]
    out = mamba_inner_fn(*first, i['A'], None, None, i['D'], delta_bias=i['delta_bias'], delta_softplus=True)
    i['B_proj_bias'] = i['C_proj_bias'] = torch.zeros(STATES)
    assert relative_error(out, inner_truth(i)) < 2e-5
    out = bimamba_inner_fn(*first, i['A'], i['A'], None, None, i['D'], i['delta_bias'], None, None, True)
    assert relative_error(out, inner_truth(i, i['A'])) < 2e-5


@pytest.mark.parametrize('device', DEVICES)
def test_scan_functions_in_their_orders(device):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
    from selective_scan import selective_scan_fn as vmamba_fn
    from selective_scan.selective_scan_interface import selective_scan_ref as vmamba_ref

    i = make_scan_inputs(d_state=2, length=37, groups=1, channels=4, device=device)
    u, delta, A, B, C, D, bias = i.values()
    z = torch.randn_like(u)
    plain, last = selective_scan(**i, delta_softplus=True, return_last_state=True)
    for function in (selective_scan_fn, selective_scan_ref):
        out, state = function(u, delta, A, B[:, 0], C[:, 0], D, z, bias, True, True)
        assert relative_error(out, plain * F.silu(z)) < 1e-5 and relative_error(state, last) < 1e-5
    for function in (vmamba_fn, vmamba_ref):
        out, state = function(u, delta, A, B, C, D, bias, True, True)
        assert relative_error(out, plain) < 1e-5 and relative_error(state, last) < 1e-5
    assert torch.equal(vmamba_fn(u, delta, A, B, C, D, bias, True, False, 1), plain)
    for function in (selective_scan_fn, selective_scan_ref):  # MambaVision does so
        assert isinstance(function(u, delta, A, B, C, delta_softplus=1, return_last_state=None), torch.Tensor)
    assert selective_scan_ref(u.half(), delta, A, B, C).dtype == torch.float16


@pytest.mark.parametrize('device', DEVICES)
def test_mamba_layer(device):
    from mamba_ssm import Mamba
    from mamba_ssm.modules.mamba_simple import Mamba as Same

    assert Same is Mamba
    layer = Mamba(MODEL, d_state=STATES, expand=1.5, dt_rank=RANK, layer_idx=3, device=device)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        'A_log': (6, 3), 'D': (6,), 'in_proj.weight': (12, 4), 'conv1d.weight': (6, 1, 4), 'conv1d.bias': (6,),
        'x_proj.weight': (8, 6), 'dt_proj.weight': (6, 2), 'dt_proj.bias': (6,), 'out_proj.weight': (4, 6),
    }  # fmt: skip
    assert layer.A_log._no_weight_decay and layer.D._no_weight_decay and layer.dt_proj.bias._no_reinit
    steps = F.softplus(layer.dt_proj.bias)
    assert steps.min() > 0.99e-3 and steps.max() < 0.101
    assert torch.allclose(layer.A_log.exp()[0], torch.arange(1.0, 4, device=device))
    x = torch.randn(BATCH, LENGTH, MODEL, device=device, requires_grad=True)

    def truth():
        zeros = torch.zeros(STATES, device=device)
        return inner_truth(
            dict(
                xz=F.linear(x, layer.in_proj.weight).mT, conv1d_weight=layer.conv1d.weight,
                conv1d_bias=layer.conv1d.bias, x_proj_weight=layer.x_proj.weight,
                delta_proj_weight=layer.dt_proj.weight, out_proj_weight=layer.out_proj.weight,
                out_proj_bias=torch.zeros(MODEL, device=device), A=-layer.A_log.exp(), D=layer.D,
                delta_bias=layer.dt_proj.bias, B_proj_bias=zeros, C_proj_bias=zeros,
            )
        )  # fmt: skip

    hold(lambda: layer(x), truth, dict(layer.named_parameters(), x=x))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert relative_error(layer(x), truth()) < 3e-2
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert Mamba(32).dt_rank == 2 and Mamba(32, dt_init='constant').dt_proj.weight.unique().numel() == 1


def test_norms_are_plain_torch():
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn
    from mamba_ssm.ops.triton.layernorm import RMSNorm

    x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    weight, bias = torch.rand(8), torch.rand(8)
    y, total = layer_norm_fn(x, weight, bias, residual=residual, prenorm=True, eps=1e-5)
    assert torch.equal(total, x + residual)
    assert torch.allclose(y, F.layer_norm(total, (8,), weight, bias, 1e-5), atol=1e-6)
    norm = RMSNorm(8, eps=1e-5)
    norm.weight.data = weight
    expected = nn.RMSNorm(8, eps=1e-5)
    expected.weight.data = weight
    assert torch.allclose(norm(x), expected(x), atol=1e-6)
    assert torch.allclose(rms_norm_fn(x, weight, None, residual, eps=1e-5), expected(total), atol=1e-6)
    y, kept = layer_norm_fn(x.half(), weight, bias, prenorm=True, residual_in_fp32=True, is_rms_norm=True)
    assert y.dtype == torch.float16 and kept.dtype == torch.float32
    with pytest.raises(TypeError):
        layer_norm_fn(x, weight, bias, residual, 1e-5, True)


def test_what_is_refused_says_the_way_out():
    from mamba_ssm import Mamba
    from mamba_ssm.ops import selective_scan_interface as interface
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    i = inner_inputs()
    u = torch.ones(1, 2, 3)
    B, A = torch.ones(1, 2, 3), torch.ones(2, 2, dtype=torch.complex64)
    for function in (interface.selective_scan_fn, interface.selective_scan_ref):
        with pytest.raises(NotImplementedError, match='A is complex, and the scan is for real A; take real A'):
            function(u, u, A, B, B)
    with pytest.raises(NotImplementedError, match='A is complex'):
        interface.mamba_inner_fn(**dict(i, A=i['A'].detach().to(torch.complex64)))
    with pytest.raises(NotImplementedError, match='b_rms_weight has no stand-in, expected None; install the original'):
        interface.mamba_inner_fn(**i, b_rms_weight=torch.ones(STATES))
    with pytest.raises(NotImplementedError, match=r'selective_state_update, for generation.*whole sequences'):
        selective_state_update(u, u)
    with pytest.raises(TypeError, match=r"bimamba_type, if_devide_out is no argument.*the fork's own mamba_ssm folder"):
        Mamba(4, bimamba_type='v2', if_devide_out=True)
    with pytest.raises(ValueError, match="dt_init is 'zeros', expected random or constant"):
        Mamba(4, dt_init='zeros')
    layer = Mamba(4)
    for call in (
        lambda: layer(torch.ones(1, 2, 4), inference_params=object()),
        lambda: layer.step(1, 2, 3),
        lambda: layer.allocate_inference_cache(1, 2),
    ):
        with pytest.raises(NotImplementedError, match='for generation step by step, has no stand-in'):
            call()
    with pytest.raises(ImportError, match='SelectiveScanFn'):
        from mamba_ssm.ops.selective_scan_interface import SelectiveScanFn  # noqa: F401


def test_compiled_modules_are_found_where_mamba_ssm_imports_them():
    import causal_conv1d_cuda
    import selective_scan_cuda
    from mamba_ssm.ops import selective_scan_interface as interface

    assert interface.selective_scan_cuda is selective_scan_cuda
    assert interface.causal_conv1d_cuda is causal_conv1d_cuda
    if importlib.util.find_spec('einops') is not None:  # which mamba_ssm needs, and we do not
        from einops import rearrange

        assert interface.rearrange is rearrange


def test_versions_are_below_that_of_mamba_2_and_ours():
    import causal_conv1d
    import mamba_ssm

    release = tuple(int(n) for n in mamba_ssm.__version__.partition('+')[0].split('.'))
    assert release < (2, 0, 4)
    assert mamba_ssm.__version__.endswith('+mmvmamba') and causal_conv1d.__version__.endswith('+mmvmamba')


@pytest.mark.parametrize('shape, message', [((2, 0, 8), 'xz has an empty dimension'), ((2, 8), 'xz must have the dim')])
def test_a_sequence_without_steps_is_refused_by_name(shape, message):
    from mamba_ssm import Mamba

    with pytest.raises(ValueError, match='mamba_inner_fn: ' + message):
        Mamba(8)(torch.randn(shape))


def test_a_wrong_convolution_is_refused_by_name():
    from mamba_ssm import Mamba

    layer = Mamba(8)
    layer.conv1d.weight.data = layer.conv1d.weight.data[1:]
    with pytest.raises(ValueError, match=r'mamba_inner_fn: weight has shape \(15, 4\), expected \(16, 4\)'):
        layer(torch.randn(2, 5, 8))

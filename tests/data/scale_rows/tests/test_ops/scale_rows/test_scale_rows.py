"""scale_rows: each backend against the naive one in float64, output and every gradient."""

import pytest
import torch

from mmvmamba.ops import BackendError, scale_rows
from tests.test_ops.triton_interpreter import INTERPRETED, patch_interpreter

if INTERPRETED:
    patch_interpreter()

RUNS = dict(
    cpu=lambda x, factors: scale_rows(x, factors, backend='cpu'),
    triton=torch.ops.mmvmamba.scale_rows_triton,  # on a CPU by Triton's interpreter alone
)


def inputs(dtype):
    return torch.randn(5, 7, dtype=dtype).requires_grad_(), torch.randn(5, dtype=dtype).requires_grad_()


def results(run, x, factors, dy):
    y = run(x, factors)
    return (y, *torch.autograd.grad(y, (x, factors), dy))


@pytest.mark.parametrize('backend', RUNS)
def test_output_and_every_gradient(backend):
    if backend == 'triton' and not INTERPRETED:
        pytest.skip("Triton's interpreter is not on")
    x, factors = inputs(torch.float32)
    dy = torch.randn(5, 7)
    doubles = [t.detach().double().requires_grad_() for t in (x, factors)]
    truth = results(lambda *t: scale_rows(*t, backend='naive'), *doubles, dy.double())
    for value, expected in zip(results(RUNS[backend], x, factors, dy), truth):
        assert (value - expected).abs().max() <= 1e-6 * (1 + expected.abs().max())


def test_is_a_well_behaved_op():
    x, factors = inputs(torch.float64)
    torch.library.opcheck(torch.ops.mmvmamba.scale_rows.default, (x, factors))
    assert torch.autograd.gradcheck(lambda *t: scale_rows(*t, backend='cpu'), (x, factors))


def test_second_derivatives_are_refused():
    x, factors = inputs(torch.float32)
    (dx,) = torch.autograd.grad(scale_rows(x, factors, backend='cpu').sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='scale_rows: second derivatives are not compiled'):
        dx.sum().backward()


def test_wrong_arguments_are_named():
    x, factors = inputs(torch.float32)
    with pytest.raises(ValueError, match=r'scale_rows: factors has shape \(4,\), expected \(5,\)'):
        scale_rows(x, factors[:4])
    with pytest.raises((BackendError, ValueError), match='backend'):
        scale_rows(x, factors, backend='other')

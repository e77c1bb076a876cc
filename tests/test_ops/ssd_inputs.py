"""Inputs and error measures of the tests of ``ssd_scan``."""

import torch

from mmvmamba.ops import ssd_scan
from tests.test_ops.scan_inputs import relative_error

NAMES = ('x', 'dt', 'A', 'B', 'C', 'D', 'dt_bias', 'initial_state')
SHARED_DTYPE = ('x', 'dt', 'B', 'C')
FORWARD_LIMIT, GRADIENT_LIMIT = 5e-6, 5e-5  # of float32


def make_ssd_inputs(
    batch=2, length=49, heads=4, channels=8, groups=2, d_state=4, dtype=torch.float32, optional=True, routes=1, seed=0
):
    """Random arguments of ``ssd_scan`` by name, with the statistics of a trained model; ``heads`` of all routes."""
    generator = torch.Generator().manual_seed(seed + length)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = dict(
        x=normal(batch, length, heads // routes, channels),
        dt=0.5 * normal(batch, length, heads),
        A=-torch.exp(0.5 * normal(heads)),
        B=normal(batch, length, groups, d_state),
        C=normal(batch, length, groups, d_state),
        D=normal(heads, channels) if optional else None,
        dt_bias=0.5 * normal(heads) if optional else None,
        initial_state=normal(batch, heads, channels, d_state) if optional else None,
    )
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: None if value is None else value.to(dtype if name in SHARED_DTYPE else state)
        for name, value in inputs.items()
    }


def run_ssd(inputs, dout=None, dlast=None, **options):
    """Output, last state and the gradients of sum(out * dout) + sum(last * dlast) for every input."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    out, last = ssd_scan(**leaves, dt_softplus=True, return_last_state=True, **options)
    result = dict(out=out.detach(), last_state=last.detach())
    if dout is not None:
        torch.autograd.backward((out, last), (dout.to(out.dtype), dlast.to(last.dtype)))
        result.update({'d' + name: t.grad for name, t in leaves.items() if t is not None})
    return result


def run_truth(inputs, dout, dlast, **options):
    """The same by the naive backend in float64."""
    inputs = {name: None if t is None else t.double() for name, t in inputs.items()}
    return run_ssd(inputs, dout.double(), dlast.double(), backend='naive', **options)


def draw_gradients(inputs):
    """Gradients of the output and of the last state."""
    x, B, heads = inputs['x'], inputs['B'], inputs['dt'].shape[2]
    generator = torch.Generator().manual_seed(7)
    last = torch.randn(x.shape[0], heads, x.shape[3], B.shape[3], generator=generator)
    return torch.randn(x.shape, generator=generator).to(x.dtype), last


def assert_ssd_close(result, truth, forward=FORWARD_LIMIT, gradient=GRADIENT_LIMIT):
    """Hold every tensor of ``result`` to the truth."""
    assert result.keys() == truth.keys()
    for name, expected in truth.items():
        assert result[name].shape == expected.shape, name
        error = relative_error(result[name], expected)
        limit = gradient if name.startswith('d') else forward
        assert error < limit, f'{name}: relative error {error:.2e}, limit {limit:.2e}'

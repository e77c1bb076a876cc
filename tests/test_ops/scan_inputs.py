"""Inputs and error measures shared by the tests of the ops."""

import torch

from mmvmamba.ops import selective_scan

NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')
SHARED_DTYPE = ('u', 'delta', 'B', 'C')  # the rest has the dtype of the state
# one rounding of a value, relative to its size
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FORWARD_LIMIT = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 5e-6, torch.bfloat16: 5e-6}
GRADIENT_LIMIT = {torch.float64: 1e-11, torch.float32: 5e-5, torch.float16: 5e-5, torch.bfloat16: 5e-5}


def make_scan_inputs(
    batch=2, groups=2, channels=3, d_state=1, length=49, dtype=torch.float32, device='cpu', optional=True, seed=0
):
    """Random arguments of ``selective_scan`` by name, with the statistics of a trained model; ``channels`` a group."""
    generator = torch.Generator().manual_seed(seed + 1000 * d_state + length)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dim = groups * channels
    inputs = dict(
        u=normal(batch, dim, length),
        delta=0.5 * normal(batch, dim, length),
        A=-torch.exp(0.5 * normal(dim, d_state)),
        B=normal(batch, groups, d_state, length),
        C=normal(batch, groups, d_state, length),
        D=normal(dim) if optional else None,
        delta_bias=0.5 * normal(dim) if optional else None,
    )
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: None if value is None else value.to(device, dtype if name in SHARED_DTYPE else state)
        for name, value in inputs.items()
    }


def run_scan(inputs, dout=None, delta_softplus=True, out_dtype=None, **options):
    """Output, last state and the gradients of sum(out * dout) for every input."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    out, last_state = selective_scan(
        **leaves, delta_softplus=delta_softplus, out_dtype=out_dtype, return_last_state=True, **options
    )
    result = dict(out=out.detach(), last_state=last_state)
    if dout is not None:
        out.backward(dout.to(out.dtype))
        result.update({'d' + name: t.grad for name, t in leaves.items() if t is not None})
    return result


def run_truth(inputs, dout=None, **options):
    """The same by the naive backend in float64."""
    inputs = {name: None if t is None else t.double() for name, t in inputs.items()}
    return run_scan(inputs, None if dout is None else dout.double(), backend='naive', **options)


def relative_error(value, expected):
    """``|value - expected| / |expected|`` in the Euclidean norm, in float64; NaN counts as infinite."""
    value, expected = value.double().to(expected.device), expected.double()
    error = (value - expected).norm() / expected.norm().clamp_min(1e-30)
    return float('inf') if error.isnan() else error.item()


def assert_scan_close(result, truth, dtype):
    """Hold every tensor of ``result`` to the truth: computed in float32, stored in its own dtype."""
    for name, expected in truth.items():
        value = result[name]
        assert value.shape == expected.shape, name
        limit = (GRADIENT_LIMIT if name.startswith('d') else FORWARD_LIMIT)[dtype] + ROUNDING[value.dtype]
        error = relative_error(value, expected)
        assert error < limit, f'{name}: relative error {error:.2e}, limit {limit:.2e}'

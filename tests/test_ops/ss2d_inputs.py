"""Inputs of the SS2D core, shared by its tests."""

import torch


def make_parameters(channels, dt_rank, d_state=1, dtype=torch.float32, device='cpu'):
    """Parameters of :func:`mmvmamba.ops.ss2d_scan` in the order of its arguments."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    parameters = (
        draw(4, dt_rank + 2 * d_state, channels) * channels**-0.5,
        draw(4, channels, dt_rank) * dt_rank**-0.5,
        draw(4, channels) - 1.5,
        0.5 * draw(4 * channels, d_state),
        draw(4 * channels),
    )
    return [value.to(device, dtype) for value in parameters]


def make_map(batch, channels, height, width, dtype=torch.float32, device='cpu', seed=1):
    """A map (B, D, H, W) with channels_last strides."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, height, width, channels, generator=generator)
    return values.to(device, dtype).permute(0, 3, 1, 2)


def run(function, x, parameters, dy):
    """Output and gradients of ``function(x, *parameters)``: y, dx, then the parameters' gradients."""
    leaves = [value.detach().requires_grad_() for value in (x, *parameters)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def relative_error(value, reference):
    """Norm of the difference over the norm of the reference, which is taken as 1 where it is smaller than 1e-6."""
    reference = reference.double()
    norm = reference.norm()
    return ((value.double() - reference).norm() / (norm if norm > 1e-6 else 1.0)).item()

"""Multi-scale deformable attention by torch's ``grid_sample``: a query reads a few points of each level's map.

Shapes: value (B, K, heads, D) with K pixels of all levels, spatial_shapes (L, 2) as heights and widths,
sampling_locations (B, Q, heads, L, P, 2) as x and y in 0 to 1, attention_weights (B, Q, heads, L, P).
"""

import torch
from torch.nn import functional as F

from .plain import plain, widen


def _attend(value, shapes: list, locations, weights):
    """The weighted sum over levels and points: (B, Q, heads * D)."""
    batch, _, heads, _ = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    maps = value.permute(0, 2, 3, 1).flatten(0, 1)  # (B * heads, D, K)
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, Q, L, P, 2)
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(shapes), points)
    pixels = maps.split([height * width for height, width in shapes], -1)
    terms = []
    for level, (height, width) in enumerate(shapes):
        sampled = F.grid_sample(pixels[level].unflatten(-1, (height, width)), grid[:, :, level], align_corners=False)
        terms.append((sampled * weights[:, :, :, level]).sum(-1))
    return torch.stack(terms).sum(0).unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


@plain
def ms_deform_attn_forward(
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights, im2col_step: int
) -> torch.Tensor:
    """What the queries read, (B, Q, heads * D)."""
    tensors = [widen(tensor) for tensor in (value, sampling_locations, attention_weights)]
    return _attend(tensors[0], spatial_shapes.tolist(), *tensors[1:]).to(value.dtype)


@plain
def ms_deform_attn_backward(
    value,
    spatial_shapes,
    level_start_index,
    sampling_locations,
    attention_weights,
    grad_output,
    grad_value,
    grad_sampling_loc,
    grad_attn_weight,
    im2col_step: int,
) -> None:
    """Gradients of values, locations and weights, into their buffers."""
    leaves = [widen(tensor).detach().requires_grad_() for tensor in (value, sampling_locations, attention_weights)]
    with torch.enable_grad():
        out = _attend(leaves[0], spatial_shapes.tolist(), *leaves[1:])
    grads = torch.autograd.grad(out, leaves, widen(grad_output))
    for buffer, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads):
        buffer.copy_(grad)

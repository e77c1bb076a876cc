"""Pooling of regions: RoIAlign by torchvision, RoIPool by torch (torchvision's rounds the regions otherwise).

Maps are (N, C, H, W) of any strides; regions (R, 5) hold the image's index and x1, y1, x2, y2.
"""

import torch

from . import roi_weights
from .plain import at_most, plain, widen


@plain
def roi_align_forward(
    input,
    rois,
    output,
    argmax_y,
    argmax_x,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Mean (``pool_mode`` 1) or maximum (0) of interpolated samples in each bin of each region.

    Args:
        input (torch.Tensor): (N, C, H, W).
        rois (torch.Tensor): (R, 5).
        output (torch.Tensor): (R, C, aligned_height, aligned_width), written.
        argmax_y (torch.Tensor): Like ``output``: row of the largest sample, written for ``pool_mode`` 0.
        argmax_x (torch.Tensor): Its column.
        aligned_height (int): Bins of a region, vertically.
        aligned_width (int): Bins of a region, horizontally.
        spatial_scale (float): Pixels of the map to one of the regions.
        sampling_ratio (int): Samples of a bin in each direction; 0 takes one a pixel.
        pool_mode (int): 0 or 1.
        aligned (bool): Whether pixels lie at their centres.
    """
    maps, size = widen(input), (aligned_height, aligned_width)
    regions = rois.to(maps.dtype)
    if pool_mode == 0:
        for part in torch.arange(len(rois)).split(at_most(len(rois), maps.shape[1] * aligned_height * aligned_width)):
            found = roi_weights.largest_samples(maps, regions[part], size, spatial_scale, sampling_ratio, aligned)
            for buffer, value in zip((output, argmax_y, argmax_x), found):
                buffer[part] = value.to(buffer.dtype)
        return
    op = torch.ops.torchvision.roi_align
    output.copy_(op(maps, regions, spatial_scale, *size, sampling_ratio, aligned))


@plain
def roi_align_backward(
    grad_output,
    rois,
    argmax_y,
    argmax_x,
    grad_input,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of the maps into ``grad_input``; the arguments are those of :func:`roi_align_forward`.

    Under ``torch.use_deterministic_algorithms`` a GPU computes it by matrix products instead of atomic additions.
    """
    grad, size = widen(grad_output), (aligned_height, aligned_width)
    regions, shape = rois.to(grad.dtype), grad_input.shape
    if pool_mode == 0:
        result = roi_weights.scatter_samples(grad, regions, widen(argmax_y), widen(argmax_x), shape)
    elif grad.is_cuda and torch.are_deterministic_algorithms_enabled():
        result = roi_weights.mean_gradient(grad, regions, spatial_scale, sampling_ratio, aligned, shape)
    else:
        op = torch.ops.torchvision._roi_align_backward
        result = op(grad, regions, spatial_scale, *size, *shape, sampling_ratio, aligned)
    grad_input.copy_(result)


@plain
def roi_pool_forward(input, rois, output, argmax, pooled_height: int, pooled_width: int, spatial_scale: float) -> None:
    """Maximum of the pixels that each bin of a region touches; 0 where it touches none.

    Args:
        input (torch.Tensor): (N, C, H, W).
        rois (torch.Tensor): (R, 5); x2 and y2 are the last pixel's.
        output (torch.Tensor): (R, C, pooled_height, pooled_width), written.
        argmax (torch.Tensor): The like, int32: index of that pixel in the map, -1 for none; written.
        pooled_height (int): Bins of a region, vertically.
        pooled_width (int): Bins of a region, horizontally.
        spatial_scale (float): Pixels of the map to one of the regions.
    """
    maps = widen(input)
    channels, height, width = maps.shape[1:]
    regions = rois.to(maps.dtype)
    rows = _pixels(regions[:, 2], regions[:, 4], pooled_height, spatial_scale, height)
    columns = _pixels(regions[:, 1], regions[:, 3], pooled_width, spatial_scale, width)
    flat = maps.flatten(2)
    bins, pixels = pooled_height * pooled_width, rows[0].shape[2] * columns[0].shape[2]
    for part in torch.arange(len(rois)).split(at_most(len(rois), channels * bins * pixels)):
        place = rows[0][part, :, None, :, None] * width + columns[0][part, None, :, None]  # (r, PH, PW, h, w)
        inside = rows[1][part, :, None, :, None] & columns[1][part, None, :, None]
        place, inside = place.flatten(3), inside.flatten(3)
        values = flat[regions[part, 0].long()[:, None, None, None], :, place].movedim(-1, 1)
        best, index = values.masked_fill(~inside[:, None], -torch.inf).max(-1)
        place = place[:, None].expand_as(values).gather(-1, index[..., None])[..., 0]
        empty = (best == -torch.inf) | best.isnan()
        output[part] = best.masked_fill(~inside.any(-1)[:, None], 0).to(output.dtype)
        argmax[part] = place.masked_fill(empty, -1).to(argmax.dtype)


def _pixels(first, last, bins: int, scale: float, size: int) -> tuple:
    """The pixels of each bin along one axis.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: (R, bins, most) positions and which of them count.
    """
    start, end = first * scale, (last + 1) * scale
    length = (end - start)[:, None] / bins
    steps = torch.arange(bins, device=first.device)
    low = (steps * length + start[:, None]).floor().clamp(0, size).long()
    high = ((steps + 1) * length + start[:, None]).ceil().clamp(0, size).long()
    high = torch.where(length > 0, high, low)
    most = max(int((high - low).max()), 1) if len(first) else 1
    place = low[..., None] + torch.arange(most, device=first.device)
    return place.clamp(max=size - 1), place < high[..., None]


@plain
def roi_pool_backward(
    grad_output, rois, argmax, grad_input, pooled_height: int, pooled_width: int, spatial_scale: float
) -> None:
    """Gradient of the maps into ``grad_input``: what a bin got goes to its largest pixel."""
    grad = widen(grad_output)
    channels = torch.arange(grad.shape[1], device=grad.device)[:, None, None]
    maps = rois[:, 0].long()[:, None, None, None] * grad.shape[1] + channels
    place = maps * (grad_input.shape[2] * grad_input.shape[3]) + argmax
    result = grad.new_zeros(grad_input.numel())
    result.index_add_(0, place[argmax >= 0], grad[argmax >= 0])
    grad_input.copy_(result.view(grad_input.shape))

"""RoIAlign's samples along one axis: what torchvision's op has no function for.

A sample lies at (y, x) and reads the map between pixels; outside (-1, size) it reads 0.
"""

import torch

from .plain import at_most


def sample_places(first, last, bins: int, scale: float, ratio: int, aligned: bool) -> tuple:
    """Places of the samples along one axis.

    Args:
        first (torch.Tensor): (R,) where the regions begin.
        last (torch.Tensor): (R,) where they end.
        bins (int): Bins of a region.
        scale (float): Pixels of the map to one of the regions.
        ratio (int): Samples of a bin; 0 takes one a pixel.
        aligned (bool): Whether pixels lie at their centres.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: (R, bins, most) places, NaN where a region has fewer samples, and (R,)
        samples of a bin.
    """
    start = first * scale - 0.5 * aligned
    length = last * scale - 0.5 * aligned - start
    length = (length if aligned else length.clamp(min=1)) / bins
    count = torch.full_like(start, ratio) if ratio > 0 else length.ceil().clamp(min=0)
    most = max(int(count.max()), 1) if len(count) else 1
    samples = torch.arange(most, device=start.device)
    steps = torch.arange(bins, device=start.device)[:, None] * length[:, None, None]
    place = start[:, None, None] + steps + (samples + 0.5) * length[:, None, None] / count[:, None, None]
    return place.masked_fill(samples >= count[:, None, None], torch.nan), count


def axis_weights(places, size: int):
    """(..., size) weights with which samples at ``places`` read the pixels of one axis."""
    inside = (places >= -1) & (places <= size)
    nearest = places.clamp(0, size - 1)[..., None]
    hat = (1 - (nearest - torch.arange(size, device=places.device)).abs()).clamp(min=0)
    return torch.where(inside[..., None], hat, 0)


def mean_weights(first, last, bins: int, scale: float, ratio: int, aligned: bool, size: int):
    """(R, bins, size) weights of the pixels of one axis in the mean of a bin's samples."""
    places, count = sample_places(first, last, bins, scale, ratio, aligned)
    total = sum(axis_weights(place, size) for place in places.unbind(-1))
    return total / count.clamp(min=1)[:, None, None]


def mean_gradient(grad, rois, scale: float, ratio: int, aligned: bool, shape):
    """Gradient of the maps by matrix products alone: the weights of a sample are those of its row times its column.

    Args:
        grad (torch.Tensor): (R, C, PH, PW).
        rois (torch.Tensor): (R, 5).
        scale (float): As in :func:`sample_places`.
        ratio (int): As there.
        aligned (bool): As there.
        shape (torch.Size): (N, C, H, W) of the maps.

    Returns:
        torch.Tensor: (N, C, H, W).
    """
    rows = mean_weights(rois[:, 2], rois[:, 4], grad.shape[2], scale, ratio, aligned, shape[2])
    columns = mean_weights(rois[:, 1], rois[:, 3], grad.shape[3], scale, ratio, aligned, shape[3])
    result = grad.new_zeros(shape)
    for image in range(shape[0]):
        own = (rois[:, 0] == image).nonzero()[:, 0]
        if not len(own):
            continue
        down = rows[own].flatten(0, 1).T  # (H, R * PH)
        channels = at_most(shape[1], len(own) * grad.shape[2] * shape[3])
        for part in range(0, shape[1], channels):
            wide = grad[own, part : part + channels] @ columns[own, None]  # (R, c, PH, W)
            wide = wide.permute(0, 2, 1, 3).flatten(0, 1)  # (R * PH, c, W)
            result[image, part : part + channels] = (down @ wide.flatten(1)).unflatten(1, wide.shape[1:]).movedim(1, 0)
    return result


def corners(places, size: int) -> tuple:
    """The two pixels of one axis between which samples lie, and the weight of the second."""
    nearest = places.clamp(0, size - 1)
    low = nearest.floor().clamp(max=max(size - 2, 0))
    return low.long(), (low.long() + 1).clamp(max=size - 1), nearest - low


def largest_samples(maps, rois, size: tuple, scale: float, ratio: int, aligned: bool) -> tuple:
    """The largest sample of each bin, the first of equal ones by rows.

    Args:
        maps (torch.Tensor): (N, C, H, W).
        rois (torch.Tensor): (R, 5).
        size (tuple): Bins, vertically and horizontally.
        scale (float): As in :func:`sample_places`.
        ratio (int): As there.
        aligned (bool): As there.

    Returns:
        tuple[torch.Tensor, ...]: Value, row and column, each (R, C, PH, PW); 0, -1 and -1 where there is no sample.
    """
    height, width = maps.shape[2:]
    ys, _ = sample_places(rois[:, 2], rois[:, 4], size[0], scale, ratio, aligned)
    xs, _ = sample_places(rois[:, 1], rois[:, 3], size[1], scale, ratio, aligned)
    image = rois[:, 0].long()[:, None, None]
    channels = maps.movedim(1, -1)  # so that pixels are read with all their channels
    best = maps.new_full((len(rois), *size, maps.shape[1]), torch.finfo(maps.dtype).min)
    row, column = best.new_full(best.shape, -1), best.new_full(best.shape, -1)
    for y in ys.unbind(-1):
        up, down, v = corners(y.nan_to_num(-2), height)
        for x in xs.unbind(-1):
            left, right, u = corners(x.nan_to_num(-2), width)
            v4, u4 = v[:, :, None, None], u[:, None, :, None]
            value = sum(
                weight * channels[image, rows[:, :, None], columns[:, None]]
                for weight, rows, columns in (
                    ((1 - v4) * (1 - u4), up, left),
                    ((1 - v4) * u4, up, right),
                    (v4 * (1 - u4), down, left),
                    (v4 * u4, down, right),
                )
            )
            outside = ((y < -1) | (y > height))[:, :, None, None] | ((x < -1) | (x > width))[:, None, :, None]
            missing = y.isnan()[:, :, None, None] | x.isnan()[:, None, :, None]
            better = (value.masked_fill(outside, 0) > best) & ~missing
            best = torch.where(better, value.masked_fill(outside, 0), best)
            row = torch.where(better, y[:, :, None, None], row)
            column = torch.where(better, x[:, None, :, None], column)
    best = best.masked_fill(row == -1, 0)  # a region without samples
    return tuple(part.movedim(-1, 1) for part in (best, row, column))


def scatter_samples(grad, rois, rows, columns, shape):
    """Gradient of the maps where each bin read one sample.

    Args:
        grad (torch.Tensor): (R, C, PH, PW).
        rois (torch.Tensor): (R, 5).
        rows (torch.Tensor): Like ``grad``: the sample's row, -1 for none.
        columns (torch.Tensor): Its column.
        shape (torch.Size): (N, C, H, W) of the maps.

    Returns:
        torch.Tensor: (N, C, H, W).
    """
    height, width = shape[2:]
    maps = rois[:, 0].long()[:, None, None, None] * shape[1]
    maps = (maps + torch.arange(shape[1], device=grad.device)[:, None, None]) * (height * width)
    up, down, v = corners(rows, height)
    left, right, u = corners(columns, width)
    outside = (rows < -1) | (rows > height) | (columns < -1) | (columns > width)
    grad = grad.masked_fill(outside | (rows == -1), 0)
    result = grad.new_zeros(shape.numel())
    for weight, row, column in (
        ((1 - v) * (1 - u), up, left),
        ((1 - v) * u, up, right),
        (v * (1 - u), down, left),
        (v * u, down, right),
    ):
        result.index_add_(0, (maps + row * width + column).flatten(), (weight * grad).flatten())
    return result.view(shape)

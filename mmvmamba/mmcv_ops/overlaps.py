"""Overlaps of boxes (x1, y1, x2, y2), whose width is x2 - x1 + offset."""

import torch

from .plain import plain, widen


def areas(boxes, offset: int):
    """Area of each box; boxes (..., 4) of torch or numpy."""
    return (boxes[..., 2] - boxes[..., 0] + offset) * (boxes[..., 3] - boxes[..., 1] + offset)


@plain
def bbox_overlaps(bboxes1, bboxes2, ious, mode: int, aligned: bool, offset: int) -> None:
    """Intersection over union, or over the first box's area, into ``ious``.

    Args:
        bboxes1 (torch.Tensor): (M, 4).
        bboxes2 (torch.Tensor): (N, 4).
        ious (torch.Tensor): (M,) if ``aligned``, else (M, N); written.
        mode (int): 0 divides by the union, 1 by the first box's area.
        aligned (bool): Each box with the one of its own row only.
        offset (int): 0, or 1 for boxes whose last pixel counts.
    """
    first, second = widen(bboxes1), widen(bboxes2)
    if not aligned:
        first = first[:, None]
    corner = torch.maximum(first[..., :2], second[..., :2])
    sides = (torch.minimum(first[..., 2:], second[..., 2:]) - corner + offset).clamp(min=0)
    common = sides[..., 0] * sides[..., 1]
    base = areas(first, offset)
    ious.copy_(common / (base if mode else base + areas(second, offset) - common))

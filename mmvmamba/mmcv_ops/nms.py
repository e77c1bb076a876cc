"""Non-maximum suppression: a box is dropped if it overlaps a better one by more than a threshold."""

import numpy as np
import torch
import torchvision

from .overlaps import areas
from .plain import plain, widen


@plain
def nms(boxes, scores, iou_threshold: float, offset: int):
    """Indices of the kept boxes, best first.

    The order is torch's unstable sort, as in mmcv: equal scores must fall as they do there.  The threshold is rounded
    to float32, as there.

    Args:
        boxes (torch.Tensor): (N, 4) as x1, y1, x2, y2.
        scores (torch.Tensor): (N,).
        iou_threshold (float): The largest overlap of a kept box with a better one.
        offset (int): 0, or 1 for boxes whose last pixel counts.
    """
    if boxes.numel() == 0:
        return boxes.new_empty(0, dtype=torch.long)
    order = scores.sort(0, descending=True)[1]
    ranked, threshold = widen(boxes)[order], float(np.float32(iou_threshold))
    if offset and boxes.device.type == 'cpu':  # torchvision has no offset, and larger boxes would be rounded otherwise
        groups = _groups(ranked.numpy(), offset, lambda overlap: overlap > threshold)
        return order[[best for best, _ in groups]]
    ranked = ranked + ranked.new_tensor([0, 0, offset, offset])
    ranks = torch.arange(len(order), 0, -1, device=boxes.device, dtype=ranked.dtype)
    return order[torchvision.ops.nms(ranked, ranks, threshold)]


def _groups(ranked: np.ndarray, offset: int, joins):
    """Each kept box and those that it drops, as ranks; boxes (N, 4) are ranked best first."""
    x1, y1, x2, y2 = columns = np.ascontiguousarray(ranked.T)
    area, left = areas(ranked, offset), np.arange(len(ranked))
    table = np.concatenate([columns, area[None]])
    while len(left):
        best, left, table = left[0], left[1:], table[:, 1:]
        width = np.minimum(x2[best], table[2]) - np.maximum(x1[best], table[0]) + np.float32(offset)
        height = np.minimum(y2[best], table[3]) - np.maximum(y1[best], table[1]) + np.float32(offset)
        common = np.maximum(0, width) * np.maximum(0, height)
        with np.errstate(divide='ignore', invalid='ignore'):
            joined = joins(common / (area[best] + table[4] - common))
        yield best, left[joined]
        if joined.any():
            left, table = left[~joined], table[:, ~joined]


@plain
def softnms(
    boxes, scores, dets, iou_threshold: float, sigma: float, min_score: float, method: int, offset: int
) -> torch.Tensor:
    """Lower the scores of boxes that overlap a better one, and drop those below ``min_score``.

    As in mmcv, a dropped box leaves its place to the last one of the list, and of equal scores the first in the list is
    the best.

    Args:
        boxes (torch.Tensor): (N, 4), on the CPU like all here.
        scores (torch.Tensor): (N,).
        dets (torch.Tensor): (N, 5); the first K rows are written: box and lowered score, best first.
        iou_threshold (float): Overlaps below it count only in method 2.
        sigma (float): Width of the Gaussian of method 2.
        min_score (float): What a score must keep.
        method (int): 0 drops the score to zero, 1 multiplies it by 1 - overlap, 2 by exp(-overlap^2 / sigma).
        offset (int): 0, or 1 for boxes whose last pixel counts.

    Returns:
        torch.Tensor: (K,) indices of the kept boxes.
    """
    table = np.concatenate([widen(boxes).numpy(), np.empty((len(boxes), 2), np.float32)], 1).T.copy()
    table[4], table[5] = areas(table[:4].T, offset), widen(scores).numpy()
    index = np.arange(len(boxes))
    threshold, width_of_gauss, least = np.float32(iou_threshold), np.float32(sigma), np.float32(min_score)
    last_pixel, place, count = np.float32(offset), 0, len(boxes)
    while place < count:
        best = place + _first_largest(table[5, place:count])
        table[:, [place, best]], index[[place, best]] = table[:, [best, place]], index[[best, place]]
        x1, y1, x2, y2, area, _ = table[:, place]
        place += 1
        rest = table[:, place:count]
        width = np.minimum(x2, rest[2]) - np.maximum(x1, rest[0]) + last_pixel
        height = np.minimum(y2, rest[3]) - np.maximum(y1, rest[1]) + last_pixel
        overlap = np.maximum(0, width) * np.maximum(0, height)
        with np.errstate(divide='ignore', invalid='ignore'):
            overlap = overlap / (area + rest[4] - overlap)
        if method == 2:
            rest[5] *= np.exp(-(overlap * overlap) / width_of_gauss, dtype=np.float64).astype(
                np.float32
            )  # the nearest float
        else:
            rest[5] *= np.where(overlap >= threshold, 1 - overlap if method else np.float32(0), np.float32(1))
        count = place + _close_gaps(rest, index[place:count], ~(rest[5] < least))
    dets[:count].copy_(torch.from_numpy(table[[0, 1, 2, 3, 5], :count].T))
    return torch.from_numpy(index[:count])


def _first_largest(scores: np.ndarray) -> int:
    """Index of the largest score; a NaN is larger than none, and none is larger than a NaN in the first place."""
    best = int(scores.argmax())
    if np.isnan(scores[best]):
        best = 0 if np.isnan(scores[0]) else int(np.nanargmax(scores))
    return best


def _close_gaps(table: np.ndarray, index: np.ndarray, kept: np.ndarray) -> int:
    """Move kept columns from the end into the places of dropped ones, as one pass does; returns their number."""
    count = int(kept.sum())
    if count < len(kept):
        gaps = np.flatnonzero(~kept[:count])
        fill = count + np.flatnonzero(kept[count:])[::-1]
        table[:, gaps], index[gaps] = table[:, fill], index[fill]
    return count


@plain
def nms_match(dets, iou_threshold: float) -> list:
    """Groups of boxes: each kept one, followed by those that it drops, by score.

    Args:
        dets (torch.Tensor): (N, 5) as x1, y1, x2, y2, score, on the CPU.
        iou_threshold (float): From this overlap on, the worse box joins the better one's group.

    Returns:
        list[list[int]]: The indices of each group.
    """
    order = dets[:, 4].sort(0, descending=True)[1]
    threshold, boxes, order = np.float32(iou_threshold), widen(dets)[order, :4].numpy(), order.numpy()
    groups = _groups(boxes, 0, lambda overlap: overlap >= threshold)
    return [[int(order[best]), *order[joined].tolist()] for best, joined in groups]

"""What the ops are tried on, and what comes out: the same for compiled mmcv, its stored results and the stand-in.

``python -m tests.test_mmcv_ops.cases`` stores the results of compiled mmcv in ``tests/data/mmcv_ops.npz``.  Numbers are
drawn by numpy's RandomState, whose sequence never changes.
"""

import importlib
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

from mmvmamba.mmcv_ops.placing import compiled_file, mmcv_folder

STORED = Path(__file__).parents[1] / 'data/mmcv_ops.npz'
KINDS = ('grid', 'dense', 'sparse', 'malformed')  # the first two have equal scores and overlaps


def load_compiled():
    """The installed compiled ``mmcv._ext``; None without one.

    It is imported by its own name: loaded a second time, under another, it would crash.
    """
    folder = mmcv_folder()
    return importlib.import_module('mmcv._ext') if folder and compiled_file(folder) else None


def make_boxes(random, count, kind):
    """(count, 4) boxes and (count,) scores."""
    corners = random.uniform(0, 20 if kind == 'dense' else 100, (2, count, 2))
    if kind == 'grid':
        corners = np.round(corners / 20) * 20
    if kind != 'malformed':
        corners = np.stack([corners.min(0), corners.max(0)])
    scores = random.uniform(0, 1, count)
    if kind in ('grid', 'dense'):
        scores = np.round(scores * 8) / 8
    boxes = np.concatenate([corners[0], corners[1]], 1)
    return torch.from_numpy(boxes.astype(np.float32)), torch.from_numpy(scores.astype(np.float32))


def nms(ops, random, rounds):
    """Indices of 5 x 4 x 5 x 2 cases a round."""
    for _, size, kind in itertools.product(range(rounds), (1, 2, 5, 12, 40), KINDS):
        boxes, scores = make_boxes(random, size, kind)
        for threshold, offset in itertools.product((0.0, 0.1, 1 / 3, 0.5, 0.7), (0, 1)):
            yield ops.nms(boxes, scores, iou_threshold=threshold, offset=offset).to(torch.int16)


def soft_nms(ops, random, rounds, methods):
    """Boxes, lowered scores and indices of 4 x 4 x 2 x 2 cases a round and method."""
    for _, size, kind in itertools.product(range(rounds), (1, 4, 11, 25), KINDS):
        boxes, scores = make_boxes(random, size, kind)
        for method, offset, least in itertools.product(methods, (0, 1), (1e-3, 0.3)):
            dets = torch.zeros(size, 5)
            settings = dict(iou_threshold=0.3, sigma=0.5, min_score=least, method=method, offset=offset)
            index = ops.softnms(boxes, scores, dets, **settings)
            yield torch.cat([dets[: len(index)], index[:, None].float()], 1)


def nms_match(ops, random, rounds):
    """Group sizes and members."""
    for _, size, kind, threshold in itertools.product(range(rounds), (1, 2, 12, 40), KINDS, (0.1, 0.5)):
        boxes, scores = make_boxes(random, size, kind)
        groups = ops.nms_match(torch.cat([boxes, scores[:, None]], 1), iou_threshold=threshold)
        yield torch.tensor([value for group in groups for value in (len(group), *group)], dtype=torch.int16)


def bbox_overlaps(ops, random, rounds):
    """Overlaps of pairs and of all."""
    for _, kind, mode, aligned, offset in itertools.product(range(rounds), KINDS, (0, 1), (False, True), (0, 1)):
        (first, _), (second, _) = (make_boxes(random, 6, kind) for _ in range(2))
        ious = torch.zeros(6) if aligned else torch.zeros(6, 6)
        ops.bbox_overlaps(first, second, ious, mode=mode, aligned=aligned, offset=offset)
        yield ious


def make_rois(random, count, images, extent, kind):
    """(count, 5) regions that reach over the image's border."""
    ends = np.sort(random.uniform(-0.15, 1.15, (2, count, 2)), 0) * extent
    if kind == 'tiny':
        ends[1] = ends[0] + random.uniform(0, 3, (count, 2))
    if kind == 'round':
        ends = ends.round()
    return torch.from_numpy(
        np.concatenate([random.randint(0, images, (count, 1)), ends[0], ends[1]], 1).astype(np.float32)
    )


def roi_align(ops, random, rounds, mode):
    """Maps, gradients and for maxima their places, of 2 x 3 x 2 x 3 x 3 x 2 cases a round."""
    options = itertools.product(
        range(rounds),
        ((1, 1, 5, 7), (2, 2, 6, 5)),
        ('any', 'tiny', 'round'),
        ((3, 2), (1, 4)),
        (1.0, 0.25, 1 / 3),
        (0, 1, 2),
        (True, False),
    )
    for _, shape, kind, (height, width), scale, ratio, aligned in options:
        maps = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
        rois = make_rois(random, 2, shape[0], max(shape[2:]) / scale, kind)
        out = torch.zeros(2, shape[1], height, width)
        places = [torch.zeros_like(out) if mode == 0 else torch.zeros(0) for _ in range(2)]
        settings = dict(
            aligned_height=height,
            aligned_width=width,
            spatial_scale=scale,
            sampling_ratio=ratio,
            pool_mode=mode,
            aligned=aligned,
        )
        ops.roi_align_forward(maps, rois, out, *places, **settings)
        if mode == 0:  # the maximum of no samples: -10000 in mmcv on a CPU, 0 here
            out[places[0] == -1] = 0
        grad = torch.from_numpy(random.standard_normal(out.shape).astype(np.float32))
        grad_maps = torch.zeros(shape)
        ops.roi_align_backward(grad, rois, *places, grad_maps, **settings)
        yield torch.cat([value.flatten() for value in (out, *places)]), grad_maps


def mask_targets(ops, random, rounds):
    """Masks cropped to boxes as mmdet does for the loss of Mask R-CNN."""
    for _ in range(8 * rounds):
        masks = torch.from_numpy((random.uniform(0, 1, (3, 1, 9, 11)) > 0.5).astype(np.float32))
        rois = make_rois(random, 6, 3, 11, 'any')
        out, empty = torch.zeros(6, 1, 7, 7), torch.zeros(0)
        settings = dict(aligned_height=7, aligned_width=7, spatial_scale=1.0, sampling_ratio=0, pool_mode=1)
        ops.roi_align_forward(masks, rois, out, empty, empty, **settings, aligned=True)
        yield out >= 0.5


DEFORM = (  # kernel, stride, padding, dilation, groups, deformable groups
    ((3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    ((3, 3), (2, 1), (1, 0), (1, 1), 2, 1),
    ((1, 3), (1, 1), (0, 1), (1, 2), 1, 2),
    ((2, 2), (1, 2), (1, 1), (2, 1), 2, 2),
)


def make_deform(random, kernel, stride, padding, dilation, groups, deform_groups):
    """Input, weight, offset, mask, bias and the output's gradient."""
    size = [
        (extent + 2 * p - d * (k - 1) - 1) // s + 1
        for extent, p, d, k, s in zip((7, 6), padding, dilation, kernel, stride)
    ]
    points = deform_groups * kernel[0] * kernel[1]
    shapes = (2, 4, 7, 6), (6, 4 // groups, *kernel), (2, points * 2, *size), (2, points, *size), (6,), (2, 6, *size)
    values = [torch.from_numpy(random.standard_normal(shape).astype(np.float32)) for shape in shapes]
    values[2] *= 2
    values[3] = values[3].sigmoid()
    return values


def deform_conv(ops, random, rounds):
    """Output and the gradients of input, offset and weight."""
    for _, options in itertools.product(range(rounds), DEFORM):
        input, weight, offset, _, _, grad = make_deform(random, *options)
        kernel, stride, padding, dilation, groups, deform_groups = options
        settings = {
            f'{name}{side}': value[side == 'W']
            for name, value in zip(('k', 'd', 'pad', 'dilation'), (kernel, stride, padding, dilation))
            for side in 'WH'
        }
        settings.update(group=groups, deformable_group=deform_groups, im2col_step=2)
        out, scratch = torch.zeros_like(grad), [torch.zeros(0), torch.zeros(0)]
        ops.deform_conv_forward(input, weight, offset, out, *scratch, **settings)
        grads = [torch.zeros_like(value) for value in (input, offset, weight)]
        ops.deform_conv_backward_input(input, offset, grad, *grads[:2], weight, scratch[0], **settings)
        ops.deform_conv_backward_parameters(input, offset, grad, grads[2], *scratch, **settings, scale=1)
        yield (out, *grads)


def modulated_deform_conv(ops, random, rounds):
    """Output and the gradients of input, weight, bias, offset and mask."""
    for _, options, with_bias in itertools.product(range(rounds), DEFORM, (True, False)):
        input, weight, offset, mask, bias, grad = make_deform(random, *options)
        bias = bias if with_bias else torch.zeros(0)
        names = (f'{name}_{side}' for name in ('kernel', 'stride', 'pad', 'dilation') for side in 'hw')
        settings = dict(zip(names, itertools.chain(*options[:4])))
        settings.update(group=options[4], deformable_group=options[5], with_bias=with_bias)
        out, scratch = torch.zeros_like(grad), [torch.zeros(0), torch.zeros(0)]
        ops.modulated_deform_conv_forward(input, weight, bias, scratch[0], offset, mask, out, scratch[1], **settings)
        grads = [torch.zeros_like(value) for value in (input, weight, bias, offset, mask)]
        ops.modulated_deform_conv_backward(
            input, weight, bias, scratch[0], offset, mask, scratch[1], *grads, grad, **settings
        )
        yield (out, *grads)


# by name: what yields the results, its last arguments, the rounds that are stored, and and the largest error, as the
# norm of the difference to that of the result; 0 for equal bits
GROUPS = {
    'nms': (nms, (), 9, 0),
    'soft_nms': (soft_nms, ((0, 1),), 1, 0),
    'soft_nms_gaussian': (soft_nms, ((2,),), 1, 3.5e-7),
    'nms_match': (nms_match, (), 2, 0),
    'bbox_overlaps': (bbox_overlaps, (), 1, 0),
    'roi_align_mean': (roi_align, (1,), 2, 0),
    'roi_align_max': (roi_align, (0,), 1, 3.5e-7),
    'mask_targets': (mask_targets, (), 4, 0),
    'deform_conv': (deform_conv, (), 1, 3.5e-7),
    'modulated_deform_conv': (modulated_deform_conv, (), 1, 3.5e-7),
}


def compute(ops, name, rounds, seed=0) -> list:
    """The results of one group, each a flat array."""
    function, arguments, _, _ = GROUPS[name]
    results = function(ops, np.random.RandomState(seed), rounds, *arguments)
    grouped = ((result,) if isinstance(result, torch.Tensor) else result for result in results)
    return [value.numpy().ravel() for group in grouped for value in group]


def main() -> None:
    """Store what compiled mmcv computes."""
    ops, arrays = load_compiled(), {}
    if ops is None:
        sys.exit('no compiled mmcv is installed')
    for name, (_, _, rounds, _) in GROUPS.items():
        results = compute(ops, name, rounds)
        arrays[name] = np.concatenate(results)
        arrays[f'{name}_sizes'] = np.array([len(result) for result in results], np.int16)
    np.savez_compressed(STORED, **arrays)
    print(f'{STORED}: {STORED.stat().st_size / 1e3:.0f} kB')


if __name__ == '__main__':
    main()

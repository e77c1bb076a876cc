"""Time and compare the stand-in for mmcv's ops with compiled mmcv, at the sizes of Mask R-CNN and Deformable DETR.

On a GPU: python tools/benchmark/mmcv_ops.py
On CPU:   python tools/benchmark/mmcv_ops.py --device cpu    (mmcv has no focal loss, RoIPool and attention there)

Both run in turn.  Prints a table, and writes it as JSON with --out FILE; the error is the norm of the difference to
compiled mmcv's result, relative to that.
"""

import argparse
import statistics
import sys
from pathlib import Path

import report
import timing
import torch

from mmvmamba.mmcv_ops import state
from mmvmamba.mmcv_ops.extension import FUNCTIONS

KERNEL = dict(kW=3, kH=3, dW=1, dH=1, padW=1, padH=1, dilationW=1, dilationH=1, group=1, deformable_group=1)
NAMES = ('kernel_h', 'kernel_w', 'stride_h', 'stride_w', 'pad_h', 'pad_w', 'dilation_h', 'dilation_w')
MODULATED = dict(zip(NAMES, (3, 3, 1, 1, 1, 1, 1, 1)), group=1, deformable_group=1, with_bias=False)
FOCAL = dict(gamma=2.0, alpha=0.25)


def make_cases(device: str, dtype: torch.dtype) -> dict:
    """By name: (op, arguments, settings, places of the buffers that it writes)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    def boxes(count, extent=1000.0):
        ends = torch.rand(count, 2, 2, generator=generator) * torch.tensor([[extent], [extent / 8]])
        return torch.cat([ends[:, 0], ends.sum(1)], 1).to(device)

    small = device == 'cpu'
    maps, regions = draw(2, 256, 100, 168), 128 if small else 512
    rois = torch.cat([torch.arange(regions)[:, None].to(device) % 2, boxes(regions, 350.0)], 1).to(dtype)
    pooled, empty = draw(regions, 256, 7, 7), maps.new_zeros(0)
    bins = dict(aligned_height=7, aligned_width=7, spatial_scale=0.25, sampling_ratio=0, pool_mode=1, aligned=True)
    pool = dict(pooled_height=7, pooled_width=7, spatial_scale=0.25)
    argmax = torch.zeros(pooled.shape, dtype=torch.int, device=device)
    few, scores = boxes(1000), torch.rand(8000, generator=generator)
    dets = torch.cat([few, scores[:1000, None].to(device)], 1).cpu()
    wide, weight, offset = draw(2, 64, 50, 84), draw(64, 64, 3, 3), draw(2, 18, 50, 84)
    mask, scratch, out = draw(2, 9, 50, 84).sigmoid(), [maps.new_zeros(0), maps.new_zeros(0)], draw(2, 64, 50, 84)
    like = torch.zeros_like
    logits, target = draw(20000, 80), torch.randint(0, 81, (20000,), generator=generator).to(device)
    shapes = torch.tensor([[100, 168], [50, 84], [25, 42], [13, 21]], device=device)
    counts = shapes.prod(1)
    value, places = draw(2, int(counts.sum()), 8, 32), (0.5 + 0.3 * draw(2, 300, 8, 4, 4, 2))
    attend = (value, shapes, torch.cat([counts[:1] * 0, counts.cumsum(0)[:-1]]), places, draw(2, 300, 8, 4, 4))
    nms = dict(iou_threshold=0.7, offset=0)
    soft = dict(iou_threshold=0.3, sigma=0.5, min_score=0.05, method=1, offset=0)
    cases = {
        'nms, 1000 boxes': ('nms', (few, scores[:1000].to(device)), nms, ()),
        'nms, 8000 boxes': ('nms', (boxes(8000), scores.to(device)), nms, ()),
        'softnms, 1000 boxes': ('softnms', (few.cpu(), scores[:1000], torch.zeros(1000, 5)), soft, ()),
        'nms_match, 1000 boxes': ('nms_match', (dets,), dict(iou_threshold=0.5), ()),
        'bbox_overlaps': (
            'bbox_overlaps',
            (few, few, torch.zeros(1000, 1000, device=device)),
            dict(mode=0, aligned=False, offset=0),
            (2,),
        ),
        'roi_align': ('roi_align_forward', (maps, rois, like(pooled), empty, empty), bins, (2,)),
        'roi_align, backward': ('roi_align_backward', (pooled, rois, empty, empty, like(maps)), bins, (4,)),
        'deform_conv': (
            'deform_conv_forward',
            (wide, weight, offset, like(out), *scratch),
            dict(KERNEL, im2col_step=2),
            (3,),
        ),
        'modulated_deform_conv': (
            'modulated_deform_conv_forward',
            (wide, weight, empty, scratch[0], offset, mask, like(out), scratch[1]),
            MODULATED,
            (6,),
        ),
        'modulated_deform_conv, backward': (
            'modulated_deform_conv_backward',
            (wide, weight, empty, scratch[0], offset, mask, scratch[1])
            + (like(wide), like(weight), like(empty), like(offset), like(mask), out),
            MODULATED,
            (7, 8, 10, 11),
        ),
    }
    if not small:
        cases.update(
            {
                'roi_pool': ('roi_pool_forward', (maps, rois, like(pooled), like(argmax)), pool, (2, 3)),
                'roi_pool, backward': ('roi_pool_backward', (pooled, rois, argmax, like(maps)), pool, (3,)),
                'sigmoid_focal_loss': (
                    'sigmoid_focal_loss_forward',
                    (logits, target, empty, like(logits)),
                    FOCAL,
                    (3,),
                ),
                'sigmoid_focal_loss, backward': (
                    'sigmoid_focal_loss_backward',
                    (logits, target, empty, like(logits)),
                    FOCAL,
                    (3,),
                ),
                'ms_deform_attn': ('ms_deform_attn_forward', attend, dict(im2col_step=64), ()),
                'ms_deform_attn, backward': (
                    'ms_deform_attn_backward',
                    (*attend, draw(2, 300, 256), like(value), like(places), like(attend[4])),
                    dict(im2col_step=64),
                    (6, 7, 8),
                ),
            }
        )
    return cases


def results_of(function, arguments, settings, written) -> list:
    """What one call returns and writes, each in float64; buffers are zeroed before, as mmcv does."""
    for i in written:
        arguments[i].zero_()
    result = function(*arguments, **settings)
    if isinstance(result, list):
        result = torch.tensor([index for group in result for index in group])
    returned = [result] if isinstance(result, torch.Tensor) else []
    return [value.double().cpu() for value in returned + [arguments[i] for i in written]]


def compare(compiled, case, device: str, repeats: int) -> dict:
    """Milliseconds of both, medians of runs in turn, and the largest error."""
    name, arguments, settings, written = case
    both = (getattr(compiled, name), FUNCTIONS[name])
    expected, found = (results_of(function, arguments, settings, written) for function in both)
    if all(a.shape == b.shape for a, b in zip(expected, found)):
        error = max(((a - b).norm() / a.norm().clamp(min=1e-30)).item() for a, b in zip(expected, found))
    else:
        error = float('nan')  # nms kept another number of boxes
    times = [[], []]
    for _ in range(repeats):
        for kept, function in zip(times, both):
            kept.append(timing.time_ms(lambda f=function: f(*arguments, **settings), device, 1, warmup=1))
    milliseconds = [statistics.median(kept) for kept in times]
    return dict(
        compiled=milliseconds[0], stand_in=milliseconds[1], ratio=milliseconds[1] / milliseconds[0], error=error
    )


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'))
    parser.add_argument('--dtype', default='float32', choices=('float32', 'float16'))
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--only', default='', help='cases whose name contains this')
    parser.add_argument('--out', type=Path, metavar='FILE', help='write the rows to this JSON file')
    options = parser.parse_args()
    if state().kind != 'compiled':
        sys.exit(f'error: compiled mmcv is needed to compare with, found: {state().reason}')
    import mmcv._ext as compiled

    rows = {}
    print(f'{"op":34}{"compiled ms":>13}{"stand-in ms":>13}{"ratio":>8}{"error":>10}')
    for name, case in make_cases(options.device, getattr(torch, options.dtype)).items():
        if options.only not in name:
            continue
        row = rows[name] = compare(compiled, case, options.device, options.repeats)
        print(
            f'{name:34}{row["compiled"]:13.3f}{row["stand_in"]:13.3f}{row["ratio"]:8.2f}{row["error"]:10.1e}',
            flush=True,
        )
    if options.out:
        report.write(
            options.out, options.device, [dict(op=name, **row) for name, row in rows.items()], dtype=options.dtype
        )


if __name__ == '__main__':
    main()

"""Accuracy of classifiers against the resolution they are tested at, on any folder of images.

python tools/analysis/robustness_resolution.py --model VMamba CONFIG CHECKPOINT --data FOLDER --sizes 128 224 384 512

FOLDER has a subfolder a class, in the order of their names.  An image is resized so that its shorter side is
size / crop-ratio, and its middle is cropped.  Writes robustness_resolution.png, .json and .md.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from mmengine.utils import ProgressBar

from mmvmamba import cli


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_models_argument(parser)
    parser.add_argument('--data', required=True, help='a folder with a subfolder a class')
    parser.add_argument(
        '--sizes', type=int, nargs='+', default=[128, 160, 192, 224, 288, 384, 512], help='default: %(default)s'
    )
    parser.add_argument('--crop-ratio', type=float, default=0.875, help='1 for no crop (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=32, help='default: %(default)s')
    parser.add_argument('--limit', type=int, help='take this many images a class at most')
    cli.add_output_arguments(parser, 'analysis/robustness_resolution')
    return parser.parse_args(arguments)


def predict(model, x: torch.Tensor) -> torch.Tensor:
    """Scores of a batch, (B, classes)."""
    with torch.no_grad():
        scores = model(x, mode='tensor')
    return scores[-1] if isinstance(scores, (tuple, list)) else scores


def accuracy(args, model, samples: list, size: int, bar: ProgressBar) -> float:
    """Top-1 accuracy in percent at one size."""
    right = 0
    for start in range(0, len(samples), args.batch_size):
        batch = samples[start : start + args.batch_size]
        images = [
            cli.resize_and_crop(
                cli.read_image(path, '--data', channels=cli.image_channels(model)), size, args.crop_ratio
            )
            for path, _ in batch
        ]
        scores = predict(model, torch.cat([cli.normalize(model, image) for image in images]))
        if not bool(scores.isfinite().all()):
            raise cli.UserError(f'the scores at size {size} are not finite; there is no accuracy')
        right += int((scores.argmax(dim=1).cpu() == torch.tensor([label for _, label in batch])).sum())
        bar.update(len(batch))
    return 100 * right / len(samples)


def measure(args: argparse.Namespace, spec: list, samples: list, classes: list) -> dict:
    """Accuracies of one model at every size."""
    name, config, checkpoint = spec
    model = cli.load_model(config, checkpoint, args.device)
    if not hasattr(model, 'head') or cli.read_config(config).default_scope != 'mmpretrain':
        raise cli.UserError(f'config {config!r} is of a {type(model).__name__}, expected a classifier of mmpretrain')
    scores = predict(model, torch.zeros(1, cli.image_channels(model), 64, 64, device=args.device)).shape[1]
    if scores != len(classes):
        raise cli.UserError(f'--data {args.data!r} has {len(classes)} classes, but config {config!r} {scores}')
    print(f'{name}:', flush=True)
    bar = ProgressBar(len(samples) * len(args.sizes))
    result = {size: accuracy(args, model, samples, size, bar) for size in args.sizes}
    print()
    return result


def draw(results: dict, path: Path) -> None:
    """A curve a model."""
    plt = cli.pyplot()
    figure, axis = plt.subplots(figsize=(6, 4), layout='constrained')
    for name, result in results.items():
        axis.plot(list(result), list(result.values()), marker='o', label=name)
    axis.set(xlabel='test resolution, pixels', ylabel='top-1 accuracy, %', ylim=(0, 102))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def run(args: argparse.Namespace) -> None:
    """Measure, draw and write."""
    cli.check_out_dir(args.out_dir, args.force)
    cli.check_device(args.device)
    cli.check_names(args.models)
    for option, value, valid in (
        ('--sizes', args.sizes, min(args.sizes) >= 4 and max(args.sizes) <= cli.MAX_SIDE),
        ('--batch-size', args.batch_size, args.batch_size >= 1),
        ('--crop-ratio', args.crop_ratio, 0 < args.crop_ratio <= 1),
        ('--limit', args.limit, args.limit is None or args.limit >= 1),
    ):
        if not valid:
            bounds = {'--sizes': f'sizes from 4 to {cli.MAX_SIDE}', '--crop-ratio': 'a number above 0, at most 1'}
            raise cli.UserError(f'{option} is {value}, expected {bounds.get(option, "at least 1")}')
    args.sizes = sorted(set(args.sizes))
    samples, classes = cli.list_samples(args.data, '--data', args.limit)
    results = {spec[0]: measure(args, spec, samples, classes) for spec in args.models}

    out_dir = cli.make_out_dir(args.out_dir)
    draw(results, out_dir / 'robustness_resolution.png')
    summary = {
        name: dict(config=config, checkpoint=checkpoint, images=len(samples), top1=results[name])
        for name, config, checkpoint in args.models
    }
    (out_dir / 'robustness_resolution.json').write_text(json.dumps(summary, indent=2) + '\n')
    lines = [f'| top-1, % | {" | ".join(map(str, args.sizes))} |', '|---' * (len(args.sizes) + 1) + '|']
    lines += [
        f'| {name} | {" | ".join(f"{value:.1f}" for value in result.values())} |' for name, result in results.items()
    ]
    (out_dir / 'robustness_resolution.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines), f'\nwrote {out_dir}/robustness_resolution.png, .json and .md')


def main(arguments=None) -> int:
    """Run the tool; returns the exit code."""
    return cli.run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

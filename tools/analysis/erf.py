"""Picture the effective receptive field: how much each input pixel moves the feature in the middle of the last map.

python tools/analysis/erf.py --model untrained CONFIG none --model trained CONFIG CHECKPOINT --images FOLDER

Writes erf.png (log scale, one panel a model, squares that hold 50 % and 99 % of the contribution), erf.npz (the fields)
and erf.json (sides of the squares that hold 20, 30, 50, 90 and 99 %).
"""

import argparse
import json
import sys

import numpy as np
from mmengine.utils import track_iter_progress

from mmvmamba import cli
from mmvmamba.analysis.receptive_field import contribution, smallest_square

SHARES = (0.2, 0.3, 0.5, 0.9, 0.99)
DRAWN = {0.5: 'white', 0.99: 'red'}
DECADES = 5  # of the log scale


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_models_argument(parser)
    parser.add_argument('--images', required=True, help='a folder of images')
    parser.add_argument('--num-images', type=int, default=20, help='number of images (default: %(default)s)')
    parser.add_argument('--size', type=int, nargs='+', default=[224], help='H [W] of the input (default: 224)')
    parser.add_argument('--seed', type=int, default=0, help='seed of untrained weights (default: %(default)s)')
    cli.add_output_arguments(parser, 'analysis/erf')
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace, spec: list, images: list, size: tuple) -> dict:
    """The field of one model, averaged over the images."""
    name, config, checkpoint = spec
    model = cli.load_model(config, checkpoint, args.device, args.seed)
    field = 0
    print(f'{name}:', flush=True)
    for path in track_iter_progress(images):
        x = cli.normalize(model, cli.read_image(path, '--images', size, cli.image_channels(model)))
        field = field + contribution(model.backbone, x) / len(images)
    print()
    if not bool(field.isfinite().all()) or field.sum() <= 0:
        raise cli.UserError(f'--model {name!r}: its gradients are not finite, or all zero; there is no field')
    return dict(field=field, squares={share: smallest_square(field, share) for share in SHARES})


def sides_text(result: dict, shares) -> str:
    """The sides of the squares as text."""
    return ', '.join(f'{share:.0%} in {result["squares"][share][0]} px' for share in shares)


def draw(results: dict, path) -> None:
    """Draw all fields side by side, on one log scale relative to the largest value of each."""
    plt = cli.pyplot()
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    figure, axes = plt.subplots(
        1, len(results), figsize=(3.6 * len(results) + 1, 4.2), layout='constrained', squeeze=False
    )
    for axis, (name, result) in zip(axes.flat, results.items()):
        values = (result['field'] / result['field'].max()).clamp(min=10.0**-DECADES)
        shown = axis.imshow(values, norm=LogNorm(10.0**-DECADES, 1), cmap='viridis')
        for share, color in DRAWN.items():
            side, row, column = result['squares'][share]
            axis.add_patch(Rectangle((column - 0.5, row - 0.5), side, side, fill=False, color=color, linewidth=1.2))
        limits = dict(xlim=(-0.5, values.shape[1] - 0.5), ylim=(values.shape[0] - 0.5, -0.5))
        axis.set(title=f'{name}\n{sides_text(result, DRAWN)}', **limits)
        axis.title.set_fontsize(10)
    held = ', '.join(f'{color} {share:.0%}' for share, color in DRAWN.items())
    figure.supxlabel(f'squares that hold a part of the contribution: {held}', fontsize=10)
    figure.colorbar(shown, ax=axes, shrink=0.8, label='contribution, relative to the largest')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(args: argparse.Namespace) -> None:
    """Measure, draw and write."""
    cli.check_out_dir(args.out_dir, args.force)
    cli.check_device(args.device)
    cli.check_names(args.models)
    size = cli.parse_size(args.size)
    if args.num_images < 1:
        raise cli.UserError(f'--num-images is {args.num_images}, expected at least 1')
    images = cli.list_images(args.images, '--images', args.num_images)
    results = {spec[0]: measure(args, spec, images, size) for spec in args.models}

    out_dir = cli.make_out_dir(args.out_dir)
    draw(results, out_dir / 'erf.png')
    np.savez_compressed(out_dir / 'erf.npz', **{name: result['field'].numpy() for name, result in results.items()})
    summary = {
        name: dict(
            config=config,
            checkpoint=checkpoint,
            images=len(images),
            size=size,
            side_in_pixels={f'{share:.0%}': square[0] for share, square in results[name]['squares'].items()},
        )
        for name, config, checkpoint in args.models
    }
    (out_dir / 'erf.json').write_text(json.dumps(summary, indent=2) + '\n')
    for name, result in results.items():
        print(f'{name}: {sides_text(result, SHARES)}')
    print(f'wrote {out_dir}/erf.png, erf.npz and erf.json')


def main(arguments=None) -> int:
    """Run the tool; returns the exit code."""
    return cli.run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

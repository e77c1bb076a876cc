"""Picture the scan as attention: the weights with which a chosen pixel reads every other one.

python tools/analysis/attention_map.py CONFIG CHECKPOINT IMAGE --pixel X Y --stage 1 --block -1

The weights follow exactly from delta, A, B and C (mmvmamba/analysis/scan_attention.py has the formula); before anything
is written they are applied to the map that is read, which must give the op's output.  Writes attention_map.png: the
merged map and the four routes, each pixel's share of the weights over the image, and the signed weights, means over
channels; and attention_map.npz with both and the weights of every channel.
"""

import argparse
import sys

import numpy as np

from mmvmamba import cli
from mmvmamba.analysis.scan_attention import ScanAttention, record_scan, scan_attention

TOLERANCE = 1e-9  # of the check; float64 rounds at 1e-16, and thousands of terms are added
ROUTES = {
    'cross2d': ('rows', 'columns', 'rows, reversed', 'columns, reversed'),
    'unidi': ('rows',) * 4,
    'bidi': ('rows', 'rows', 'rows, reversed', 'rows, reversed'),
}


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='path of the config, or SCOPE::NAME')
    parser.add_argument('checkpoint', help="path or URL of the checkpoint, or 'none' for initial weights")
    parser.add_argument('image', help='path of the image')
    parser.add_argument(
        '--pixel',
        type=int,
        nargs=2,
        metavar=('X', 'Y'),
        help='the pixel that reads, in the (resized) image; default: its middle',
    )
    parser.add_argument('--stage', type=int, default=0, help='stage, from 0 (default: %(default)s)')
    parser.add_argument('--block', type=int, default=-1, help='block of the stage, from 0; -1 is the last, the default')
    parser.add_argument('--size', type=int, nargs='+', help="resize the image to H [W] (default: the image's own size)")
    cli.add_output_arguments(parser, 'analysis/attention_map')
    return parser.parse_args(arguments)


def find_pixel(pixel, image: np.ndarray, cells: tuple) -> tuple:
    """The cell (row, column) of the map in which a pixel (x, y) of the image lies; and that pixel."""
    height, width = image.shape[:2]
    x, y = pixel or (width // 2, height // 2)
    if not (0 <= x < width and 0 <= y < height):
        raise cli.UserError(f'--pixel is {x} {y}, outside the image, whose X is 0 to {width - 1}, Y 0 to {height - 1}')
    return (y * cells[0] // height, x * cells[1] // width), (x, y)


def draw(image: np.ndarray, pixel: tuple, attention: ScanAttention, routes: tuple, path) -> None:
    """Draw shares over the image above, signed weights below; merged first, then the routes."""
    plt = cli.pyplot()
    shares, merged = attention.normalized()
    raw = attention.raw()
    rgb, (height, width) = cli.as_rgb(image), image.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    figure, axes = plt.subplots(2, 6, figsize=(15, 5.6), layout='constrained')
    axes[0, 0].imshow(rgb)
    axes[0, 0].set_title('the pixel that reads')
    axes[1, 0].axis('off')
    titles = ('merged', *routes)
    maps = (merged, *shares), (raw.sum(dim=0), *raw)
    for column, title in enumerate(titles, start=1):
        top, bottom = axes[0, column], axes[1, column]
        top.imshow(rgb.mean(axis=2), cmap='gray')
        values = maps[0][column - 1].cpu()
        top.imshow(values, extent=extent, cmap='inferno', alpha=0.7, vmin=0, interpolation='nearest')
        top.set_title(title)
        values = maps[1][column - 1].cpu()
        limit = float(values.abs().max()) or 1.0
        shown = bottom.imshow(values, extent=extent, cmap='RdBu_r', vmin=-limit, vmax=limit, interpolation='nearest')
        figure.colorbar(shown, ax=bottom, shrink=0.8, location='bottom')
    axes[0, 1].set_ylabel('share of |w|')
    axes[1, 1].set_ylabel('w, signed')
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        if axis.axison:
            axis.plot(*pixel, 'o', markersize=6, markerfacecolor='none', markeredgecolor='cyan', markeredgewidth=1.5)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def run(args: argparse.Namespace) -> None:
    """Compute, check, draw and write."""
    cli.check_out_dir(args.out_dir, args.force)
    cli.check_device(args.device)
    size = cli.parse_size(args.size)
    cli.read_image(args.image, 'image')  # what is no image is refused before a model is loaded
    model = cli.load_model(args.config, args.checkpoint, args.device)
    image = cli.read_image(args.image, 'image', size, cli.image_channels(model))
    backbone = cli.require_vmamba(model, args.config)
    try:
        call = record_scan(backbone, args.stage, args.block, cli.normalize(model, image))
    except ValueError as error:
        raise cli.UserError(f'--stage {args.stage} --block {args.block}: {error}') from error
    cell, pixel = find_pixel(args.pixel, image, call['x'].shape[2:])
    attention = scan_attention(call, *cell)
    if not attention.error() < TOLERANCE:
        raise cli.UserError(
            f'the weights give an output that is off by {attention.error():.1e} of the largest, expected below '
            f'{TOLERANCE}; are the weights of the checkpoint finite?'
        )

    out_dir = cli.make_out_dir(args.out_dir)
    draw(image, pixel, attention, ROUTES[call['scan_mode']], out_dir / 'attention_map.png')
    shares, merged = attention.normalized()
    raw = attention.raw()
    arrays = dict(raw=raw, raw_merged=raw.sum(dim=0), normalized=shares, normalized_merged=merged, skip=attention.skip)
    np.savez_compressed(
        out_dir / 'attention_map.npz',
        cell=cell,
        pixel=pixel,
        weights=attention.weights.float().cpu().numpy(),  # every channel; float32 halves the file
        **{name: value.cpu().numpy() for name, value in arrays.items()},
    )
    rows, columns = merged.shape
    print(
        f'pixel {pixel} is cell {cell} of {rows}x{columns}; weights times values give the output of the op within '
        f'{attention.error():.1e}; wrote {out_dir}/attention_map.png and attention_map.npz'
    )


def main(arguments=None) -> int:
    """Run the tool; returns the exit code."""
    return cli.run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

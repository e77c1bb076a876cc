"""Picture the scan as attention: the weights with which a chosen pixel reads every other one.

python tools/analysis/attention_map.py CONFIG CHECKPOINT IMAGE --pixel X Y --stage 1 --block -1
python tools/analysis/attention_map.py CONFIG CHECKPOINT IMAGE --forms CB CwBw ww --vit CONFIG CHECKPOINT --matrix

The weights follow exactly from delta, A, B and C (mmvmamba/analysis/scan_attention.py has the formula); before anything
is written they are applied to the map that is read, which must give the op's output.  Forms are those of the published
code, under its names; w is the product of decays, and of several states their sum is taken:

    CB: C B    CBdt: C B delta    CwBw: C w B    CwBdtw: C w B delta, which gives the output (default)    ww: w alone

Writes attention_map.png: for each form the activation maps of the pixel, merged and of the four routes; above each
pixel's share of the weights over the image, below the signed weights, means over channels.  attention_map.npz has both
and the weights of every channel.  --vit adds how a vision transformer reads from the same pixel, means over heads: its
attention above, its scores before softmax below.  --matrix writes attention_matrix.png and .npz, the attention maps of
all pixels as matrices: merged, of the four routes, and the mean of the routes once each is scaled to 0 to 1.
"""

import argparse
import sys

import numpy as np
import torch
from mmengine.utils import ProgressBar

from mmvmamba import cli
from mmvmamba.analysis.scan_attention import (
    EXACT,
    FORMS,
    MAX_PIXELS,
    ScanAttention,
    attention_matrix,
    record_scan,
    route_order,
    scan_attention,
)
from mmvmamba.analysis.vit_attention import VitAttention, vit_attention

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
    parser.add_argument(
        '--forms',
        nargs='+',
        default=[EXACT],
        metavar='FORM',
        help=f'one or more of {", ".join(FORMS)} (default: {EXACT})',
    )
    parser.add_argument(
        '--vit', nargs=2, metavar=('CONFIG', 'CHECKPOINT'), help='a vision transformer to show beside it, such as DeiT'
    )
    parser.add_argument('--vit-layer', type=int, help='layer of --vit, from 0; -1 is the last, the default')
    parser.add_argument(
        '--matrix', action='store_true', help=f'also the whole attention maps, of at most {MAX_PIXELS} pixels'
    )
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


def check_arguments(args: argparse.Namespace) -> None:
    """Check what only this tool has."""
    unknown = [form for form in args.forms if form not in FORMS]
    if unknown or len(set(args.forms)) < len(args.forms):
        raise cli.UserError(f'--forms is {" ".join(args.forms)}, expected different ones of {", ".join(FORMS)}')
    if args.vit_layer is not None and args.vit is None:
        raise cli.UserError(f'--vit-layer is {args.vit_layer} without --vit, whose layer it is')


def read_vit(args: argparse.Namespace, size) -> VitAttention:
    """Attention of the image in the vision transformer of --vit."""
    config, checkpoint = args.vit
    model = cli.load_model(config, checkpoint, args.device)
    image = cli.read_image(args.image, 'image', size, cli.image_channels(model))
    layer = -1 if args.vit_layer is None else args.vit_layer
    try:
        return vit_attention(model.backbone, layer, cli.normalize(model, image))
    except ValueError as error:
        raise cli.UserError(f'--vit {config} --vit-layer {layer}: {error}') from error


def check_error(error: float) -> None:
    """Check that weights give the output; NaN does not."""
    if not error < TOLERANCE:
        raise cli.UserError(
            f'the weights give an output that is off by {error:.1e} of the largest, expected below {TOLERANCE}; are '
            'the weights of the checkpoint finite?'
        )


def show_signed(figure, axis, values: torch.Tensor, **where) -> None:
    """Values around zero, with their scale."""
    values = values.cpu()
    limit = float(values.abs().max()) or 1.0
    shown = axis.imshow(values, cmap='RdBu_r', vmin=-limit, vmax=limit, interpolation='nearest', **where)
    figure.colorbar(shown, ax=axis, shrink=0.8, location='bottom', ticks=(-limit, 0, limit), format='%.2g')


def draw(image: np.ndarray, pixel: tuple, attentions: list, routes: tuple, vit: tuple, path) -> None:
    """Two rows a form: shares over the image, and signed weights; merged first, then the routes.

    Args:
        image (np.ndarray): The image.
        pixel (tuple[int, int]): X and Y of the pixel that reads.
        attentions (list[ScanAttention]): One a form.
        routes (tuple[str]): Names of the routes.
        vit (tuple): Name, weights and scores of a vision transformer; empty for none.
        path (Path): Where to write it.
    """
    plt = cli.pyplot()
    rgb, (height, width) = cli.as_rgb(image), image.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    rows, columns = 2 * len(attentions), 6 + bool(vit)
    figure, axes = plt.subplots(rows, columns, figsize=(2.5 * columns, 2.8 * rows), layout='constrained')

    def show_over_image(axis, values):
        axis.imshow(rgb.mean(axis=2), cmap='gray')
        axis.imshow(values.cpu(), extent=extent, cmap='inferno', alpha=0.7, vmin=0, interpolation='nearest')

    axes[0, 0].imshow(rgb)
    axes[0, 0].set_title('the pixel that reads')
    empty = [*axes[1:, 0], *(axes[2:, 6] if vit else ())]
    for column, title in enumerate(('merged', *routes), start=1):
        axes[0, column].set_title(title)
    for attention, top, bottom in zip(attentions, axes[::2], axes[1::2]):
        shares, merged = attention.normalized()
        raw = attention.raw()
        for column in range(1, 6):
            show_over_image(top[column], merged if column == 1 else shares[column - 2])
            signed = raw.sum(dim=0) if column == 1 else raw[column - 2]
            show_signed(figure, bottom[column], signed, extent=extent)
        top[1].set_ylabel(f'share of |{FORMS[attention.form]}|')
        bottom[1].set_ylabel(f'{FORMS[attention.form]}, signed')
    if vit:
        title, weights, scores = vit
        axes[0, 6].set_title(title)
        show_over_image(axes[0, 6], weights)
        show_signed(figure, axes[1, 6], scores, extent=extent)
        axes[0, 6].set_ylabel('attention')
        axes[1, 6].set_ylabel('scores')
    for axis in empty:
        axis.axis('off')
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        if axis.axison:
            axis.plot(*pixel, 'o', markersize=6, markerfacecolor='none', markeredgecolor='cyan', markeredgewidth=1.5)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def matrices(call: dict, forms: list) -> dict:
    """Attention maps of each form: those of the routes, their sum and the mean of them scaled to 0 to 1."""
    bar, found = ProgressBar(call['x'].shape[2] * len(forms)), {}
    for form in forms:
        routes = attention_matrix(call, form, bar.update)
        low, high = (extreme(routes, dim=(1, 2), keepdim=True) for extreme in (torch.amin, torch.amax))
        scaled = (routes - low) / (high - low).clamp(min=torch.finfo(routes.dtype).tiny)
        found[form] = dict(routes=routes, merged=routes.sum(dim=0), mean_scaled=scaled.mean(dim=0))
    print()
    return found


def draw_matrices(found: dict, order: torch.Tensor, routes: tuple, path) -> None:
    """Two rows a form: pixels counted by rows of the map, and in the order of each route."""
    plt = cli.pyplot()
    figure, axes = plt.subplots(2 * len(found), 6, figsize=(15, 5.6 * len(found)), layout='constrained')
    for column, title in enumerate(('merged', *routes, 'mean of scaled routes')):
        axes[0, column].set_title(title)
    for (form, maps), top, bottom in zip(found.items(), axes[::2], axes[1::2]):
        show_signed(figure, top[0], maps['merged'])
        shown = top[5].imshow(maps['mean_scaled'].cpu(), cmap='inferno', interpolation='nearest')
        figure.colorbar(shown, ax=top[5], shrink=0.8, location='bottom')
        for column, (matrix, steps) in enumerate(zip(maps['routes'], order), start=1):
            show_signed(figure, top[column], matrix)
            show_signed(figure, bottom[column], matrix[steps][:, steps])
        top[0].set_ylabel(FORMS[form])
        bottom[1].set_ylabel('as the route goes')
        bottom[0].axis('off')
        bottom[5].axis('off')
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def arrays_of(attention: ScanAttention) -> dict:
    """What attention_map.npz holds of a form."""
    shares, merged = attention.normalized()
    raw = attention.raw()
    arrays = dict(raw=raw, raw_merged=raw.sum(dim=0), normalized=shares, normalized_merged=merged)
    arrays['weights'] = attention.weights.float()  # every channel; float32 halves the file
    return {f'{attention.form}_{name}': value.cpu().numpy() for name, value in arrays.items()}


def run(args: argparse.Namespace) -> None:
    """Compute, check, draw and write."""
    cli.check_out_dir(args.out_dir, args.force)
    cli.check_device(args.device)
    check_arguments(args)
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
    exact = scan_attention(call, *cell)
    check_error(exact.error())
    attentions = [exact if form == EXACT else scan_attention(call, *cell, form) for form in args.forms]
    arrays, shown = dict(cell=cell, pixel=pixel, skip=exact.skip.cpu().numpy()), ()
    for attention in attentions:
        arrays.update(arrays_of(attention))
    if args.vit:
        vit = read_vit(args, size)
        check_error(vit.error())
        place, _ = find_pixel(pixel, image, vit.grid)
        weights, scores = vit.of_patch(*place)
        shown = f'{args.vit[0].split("/")[-1].removesuffix(".py")[:24]}, layer {vit.layer}', weights, scores
        arrays.update(vit_cell=place, vit_attention=weights.cpu().numpy(), vit_scores=scores.cpu().numpy())
    try:
        found = matrices(call, args.forms) if args.matrix else {}
    except ValueError as error:
        raise cli.UserError(
            f'--matrix at stage {args.stage}: {error}; take a later stage or a smaller --size'
        ) from error

    out_dir, routes, written = cli.make_out_dir(args.out_dir), ROUTES[call['scan_mode']], 'attention_map.png and .npz'
    draw(image, pixel, attentions, routes, shown, out_dir / 'attention_map.png')
    np.savez_compressed(out_dir / 'attention_map.npz', **arrays)
    if found:
        order = route_order(call)
        draw_matrices(found, order, routes, out_dir / 'attention_matrix.png')
        named = {f'{form}_{name}': value.cpu().numpy() for form, maps in found.items() for name, value in maps.items()}
        np.savez_compressed(out_dir / 'attention_matrix.npz', order=order.cpu().numpy(), **named)
        written += ', attention_matrix.png and .npz'
    rows, columns = exact.x.shape[1:]
    print(
        f'pixel {pixel} is cell {cell} of {rows}x{columns}; weights times values give the output of the op within '
        f'{exact.error():.1e}; wrote {written} into {out_dir}'
    )


def main(arguments=None) -> int:
    """Run the tool; returns the exit code."""
    return cli.run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

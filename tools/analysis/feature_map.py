"""Picture the feature maps of a backbone's stages through mmengine's visualizer.

python tools/analysis/feature_map.py CONFIG CHECKPOINT IMAGE

Writes feature_map.png (a row a stage: the mean over channels on the image, then the strongest channels) and
feature_map.npz (the maps themselves).
"""

import argparse
import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.visualization import Visualizer

from mmvmamba import cli
from mmvmamba.models import VSSMBackbone


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='path of the config, or SCOPE::NAME')
    parser.add_argument('checkpoint', help="path or URL of the checkpoint, or 'none' for initial weights")
    parser.add_argument('image', help='path of the image')
    parser.add_argument('--channels', type=int, default=4, help='strongest channels to show (default: %(default)s)')
    parser.add_argument('--size', type=int, nargs='+', help="resize the image to H [W] (default: the image's own size)")
    cli.add_output_arguments(parser, 'analysis/feature_map')
    return parser.parse_args(arguments)


def stage_maps(model, x: torch.Tensor) -> dict:
    """Each stage's map (C, h, w): of a VMamba what its blocks return, of another backbone what it returns itself."""
    maps, handles = {}, []
    if isinstance(model.backbone, VSSMBackbone):
        for stage, layer in enumerate(model.backbone.layers):
            hook = partial(lambda stage, _module, _x, out: maps.update({stage: out[0]}), stage)
            handles.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        outs = model.backbone(x)
    for handle in handles:
        handle.remove()
    if not maps:
        maps = dict(zip(model.backbone.out_indices, (out[0] for out in outs)))
    return {f'stage {stage}': features for stage, features in sorted(maps.items())}


def panels(features: torch.Tensor, image: np.ndarray, channels: int) -> list:
    """The mean over the image, then the channels of the largest mean activation; each an RGB picture."""
    rgb = cli.as_rgb(image)
    strongest = features.mean(dim=(1, 2)).topk(min(channels, len(features))).indices
    features = F.interpolate(features[None], image.shape[:2], mode='nearest')[0]  # shows the cells as they are
    mean = Visualizer.draw_featmap(features, rgb, channel_reduction='squeeze_mean', alpha=0.4)
    return [mean] + [Visualizer.draw_featmap(features[i : i + 1], channel_reduction='squeeze_mean') for i in strongest]


def draw(maps: dict, image: np.ndarray, channels: int, path) -> None:
    """A row a stage."""
    plt = cli.pyplot()
    rows = [(name, features, panels(features, image, channels)) for name, features in maps.items()]
    columns = max(len(pictures) for _, _, pictures in rows)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2.4 * columns, 2.5 * len(rows)), layout='constrained', squeeze=False
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for line, (name, features, pictures) in zip(axes, rows):
        for axis, picture in zip(line, pictures):
            axis.imshow(picture)
        line[0].set_ylabel(f'{name}, {"x".join(map(str, features.shape))}')
    axes[0, 0].set_title('mean over channels')
    if columns > 1:
        axes[0, 1].set_title('strongest channels')
    figure.savefig(path, dpi=80)
    plt.close(figure)


def run(args: argparse.Namespace) -> None:
    """Compute, draw and write."""
    cli.check_out_dir(args.out_dir, args.force)
    cli.check_device(args.device)
    if args.channels < 0:
        raise cli.UserError(f'--channels is {args.channels}, expected at least 0')
    size = cli.parse_size(args.size)
    cli.read_image(args.image, 'image')  # what is no image is refused before a model is loaded
    model = cli.load_model(args.config, args.checkpoint, args.device)
    image = cli.read_image(args.image, 'image', size, cli.image_channels(model))
    maps = stage_maps(model, cli.normalize(model, image))

    out_dir = cli.make_out_dir(args.out_dir)
    draw(maps, image, args.channels, out_dir / 'feature_map.png')
    arrays = {name.replace(' ', '_'): features.cpu().numpy() for name, features in maps.items()}
    np.savez_compressed(out_dir / 'feature_map.npz', **arrays)
    print(f'wrote {out_dir}/feature_map.png and feature_map.npz')


def main(arguments=None) -> int:
    """Run the tool; returns the exit code."""
    return cli.run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

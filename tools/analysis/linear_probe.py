"""Fit a linear classifier to the features of a frozen model, and report its accuracy: a linear probe.

python tools/analysis/linear_probe.py CONFIG CHECKPOINT --data FOLDER [--size 224] [--resume]

CONFIG is that of a classifier, detector or segmentor, or the name of an arch, such as tiny-s1l8.  FOLDER has train and
val, with a subfolder a class each.  A classifier's features are what its head takes, others' the mean of the last map.
An image is resized so that its shorter side is size / crop-ratio, and its middle is cropped.

Features go to features/ in --out-dir, shard by shard; --resume goes on with those that are whole.  Then logistic
regression by L-BFGS is fitted to all of train.  Writes linear_probe.json, the accuracies, and linear_probe.pth, the
weights under the names of mmpretrain's LinearClsHead.  --resume --force fits again, with another --l2 for example.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
from mmengine.model import ImgDataPreprocessor
from mmengine.utils import ProgressBar
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmvmamba import cli
from mmvmamba.analysis.feature_cache import IDENTITY, FeatureCache
from mmvmamba.analysis.linear_probe import LinearClassifier, fit_linear_classifier
from mmvmamba.checkpoint import write_checkpoint
from mmvmamba.models import ARCHS, VSSMBackbone

SPLITS = ('train', 'val')
RESULTS = ('linear_probe.json', 'linear_probe.pth')
IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help=f'path of the config, SCOPE::NAME, or one of {", ".join(ARCHS)}')
    parser.add_argument('checkpoint', help="path or URL of the checkpoint, or 'none' for initial weights")
    parser.add_argument('--data', required=True, help='a folder with train and val, a subfolder a class each')
    parser.add_argument('--size', type=int, default=224, help='side of the images in pixels (default: %(default)s)')
    parser.add_argument('--crop-ratio', type=float, default=0.875, help='1 for no crop (default: %(default)s)')
    parser.add_argument('--limit', type=int, help='take this many images a class at most')
    parser.add_argument('--batch-size', type=int, default=64, help='default: %(default)s')
    parser.add_argument('--workers', type=int, default=2, help='processes that read images (default: %(default)s)')
    parser.add_argument('--shard-size', type=int, default=4096, help='images of a shard (default: %(default)s)')
    parser.add_argument('--l2', type=float, default=1e-4, help='penalty on squared weights (default: %(default)s)')
    parser.add_argument('--iterations', type=int, default=100, help='of L-BFGS, at most (default: %(default)s)')
    parser.add_argument('--resume', action='store_true', help='go on with the features that --out-dir holds')
    cli.add_output_arguments(parser, 'analysis/linear_probe')
    return parser.parse_args(arguments)


class Images(Dataset):
    """Resized and cropped images by number; what can't be read is the text that says why."""

    def __init__(self, samples: list, channels: int, args: argparse.Namespace):
        self.samples, self.channels, self.args = samples, channels, args

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        try:
            image = cli.read_image(self.samples[index][0], '--data', channels=self.channels)
        except cli.UserError as error:
            return str(error)
        return cli.resize_and_crop(image, self.args.size, self.args.crop_ratio)


def check_arguments(args: argparse.Namespace) -> None:
    """Check every number before any work."""
    at_least_one = (('--batch-size', args.batch_size), ('--shard-size', args.shard_size), ('--limit', args.limit))
    for option, value, valid, expected in (
        ('--size', args.size, 4 <= args.size <= cli.MAX_SIDE, f'a number from 4 to {cli.MAX_SIDE}'),
        ('--crop-ratio', args.crop_ratio, 0 < args.crop_ratio <= 1, 'a number above 0, at most 1'),
        ('--workers', args.workers, args.workers >= 0, 'at least 0'),
        ('--l2', args.l2, 0 <= args.l2 < float('inf'), 'a finite number, at least 0'),
        ('--iterations', args.iterations, args.iterations >= 1, 'at least 1'),
        *((option, value, value is None or value >= 1, 'at least 1') for option, value in at_least_one),
    ):
        if not valid:
            raise cli.UserError(f'{option} is {value}, expected {expected}')


def check_place(args: argparse.Namespace) -> None:
    """Check that nothing of the user's would be replaced."""
    if not args.resume:
        return cli.check_out_dir(args.out_dir, args.force)
    finished = [name for name in RESULTS if (args.out_dir / name).exists()]
    if finished and not args.force:
        raise cli.UserError(f'--out-dir {str(args.out_dir)!r} has {finished[0]}; expected none, or --force as well')
    if not (args.out_dir / 'features' / IDENTITY).is_file():
        cli.check_out_dir(args.out_dir, force=False)  # a new folder has nothing to go on with
    return cli.check_writable(args.out_dir, '--out-dir')


def list_splits(data: str, limit) -> tuple:
    """Samples of train and val, and the names of the classes, which both must have."""
    listed = {split: cli.list_samples(str(Path(data) / split), '--data', limit) for split in SPLITS}
    (train, classes), (val, others) = (listed[split] for split in SPLITS)
    if classes != others or len(classes) < 2:
        different = sorted(set(classes) ^ set(others)) or classes
        raise cli.UserError(
            f'--data {data!r} has {len(classes)} classes in train and {len(others)} in val (look at '
            f'{", ".join(different[:3])}); expected the same, and at least two'
        )
    return dict(train=train, val=val), classes


def build(args: argparse.Namespace) -> nn.Module:
    """The frozen model, with ``backbone`` and ``data_preprocessor``."""
    if args.config not in ARCHS:
        return cli.load_model(args.config, args.checkpoint, args.device)
    torch.manual_seed(0)
    init_cfg = dict(type='Pretrained', checkpoint=args.checkpoint)
    backbone = VSSMBackbone(args.config, init_cfg=None if args.checkpoint == cli.NO_CHECKPOINT else init_cfg)
    backbone.init_weights()
    model = nn.Module()
    model.backbone, model.data_preprocessor = backbone, ImgDataPreprocessor(**IMAGENET)
    return model.to(args.device).eval()


@torch.no_grad()
def extract(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Features (B, C) of a batch: what a classifier's neck gives its head, or the last map of a backbone, averaged."""
    features = model.extract_feat(x) if hasattr(model, 'head') else model.backbone(x)
    features = features[-1] if isinstance(features, (tuple, list)) else features
    features = features.mean(dim=(2, 3)) if features.dim() == 4 else features
    if features.dim() != 2:
        raise cli.UserError(f'the features have shape {tuple(features.shape)}, expected (B, C) or (B, C, H, W)')
    return features.float().cpu()


def describe(args: argparse.Namespace, model: nn.Module, classes: list) -> dict:
    """What makes the features what they are."""
    config = args.config if args.config in ARCHS else cli.read_config(args.config).model
    digest = hashlib.sha256(f'{config} {model}'.encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    mean, std, to_rgb = cli.preprocessing(model)
    return dict(
        model=digest.hexdigest()[:16],
        size=args.size,
        crop_ratio=args.crop_ratio,
        mean=mean,
        std=std,
        to_rgb=bool(to_rgb),
        classes=classes,
    )


def digest_of(samples: list) -> str:
    """A name for the images of a shard: their paths, sizes and classes."""
    lines = (f'{path.absolute()} {path.stat().st_size} {label}' for path, label in samples)
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()


def fill(cache: FeatureCache, args: argparse.Namespace, model: nn.Module, splits: dict) -> dict:
    """Compute the shards that are missing; returns their number in each split."""
    shards = {
        (split, i // args.shard_size): samples[i : i + args.shard_size]
        for split, samples in splits.items()
        for i in range(0, len(samples), args.shard_size)
    }
    digests = {place: digest_of(samples) for place, samples in shards.items()}
    missing = [place for place in shards if not cache.has(*place, digests[place])]
    print(f'features: {len(shards) - len(missing)} of {len(shards)} shards are there', flush=True)
    bar = ProgressBar(sum(len(shards[place]) for place in missing)) if missing else None
    for place in missing:
        images, features = Images(shards[place], cli.image_channels(model), args), []
        for batch in DataLoader(images, args.batch_size, num_workers=args.workers, collate_fn=list):
            problems = [image for image in batch if isinstance(image, str)]
            if problems:
                raise cli.UserError(problems[0])
            features.append(extract(model, torch.cat([cli.normalize(model, image) for image in batch])))
            bar.update(len(batch))
        labels = torch.tensor([label for _, label in shards[place]])
        cache.write(*place, torch.cat(features).numpy(), labels.numpy(), digests[place])
    print()
    return {split: sum(other == split for other, _ in shards) for split in splits}


def write_results(args: argparse.Namespace, classifier: LinearClassifier, data: dict, classes: list) -> dict:
    """Accuracies and weights; the summary."""
    few = len(classes) <= 5  # every label is among five of five
    accuracy = {
        f'top{k}': {split: None if k == 5 and few else classifier.accuracy(*data[split], k) for split in SPLITS}
        for k in (1, 5)
    }
    summary = dict(
        config=args.config,
        checkpoint=args.checkpoint,
        data=args.data,
        images={split: len(data[split][1]) for split in SPLITS},
        channels=data['train'][0].shape[1],
        size=args.size,
        crop_ratio=args.crop_ratio,
        l2=args.l2,
        iterations=classifier.iterations,
        loss=classifier.loss,
        **accuracy,
        classes=classes,
    )
    state = {'head.fc.weight': classifier.weight, 'head.fc.bias': classifier.bias}
    write_checkpoint(dict(state_dict=state, meta=dict(classes=classes)), args.out_dir / RESULTS[1])
    (args.out_dir / RESULTS[0]).write_text(json.dumps(summary, indent=2) + '\n')
    return summary


def run(args: argparse.Namespace) -> None:
    """Extract, fit, evaluate and write."""
    check_arguments(args)
    check_place(args)
    cli.check_device(args.device)
    splits, classes = list_splits(args.data, args.limit)
    model = build(args)

    folder = cli.make_out_dir(args.out_dir) / 'features'
    if not args.resume:
        for path in (folder / IDENTITY, *(path for split in SPLITS for path in folder.glob(f'{split}-[0-9]*.npz'))):
            path.unlink(missing_ok=True)  # with --force: all is made anew
    try:
        cache = FeatureCache(folder, describe(args, model, classes))
    except ValueError as error:
        raise cli.UserError(f'--resume: {error}') from error
    shards = fill(cache, args, model, splits)
    data = {split: tuple(map(torch.from_numpy, cache.read(split, shards[split]))) for split in SPLITS}

    print('classifier:', flush=True)
    bar = ProgressBar(args.iterations)
    try:
        classifier = fit_linear_classifier(
            *data['train'], len(classes), args.l2, args.iterations, args.device, progress=bar.update
        )
    except ValueError as error:
        raise cli.UserError(str(error)) from error
    print()
    summary = write_results(args, classifier, data, classes)
    top5 = '' if summary['top5']['val'] is None else f', top-5 {summary["top5"]["val"]:.2f} %'
    print(f'val: top-1 {summary["top1"]["val"]:.2f} %{top5}; wrote {" and ".join(RESULTS)} into {args.out_dir}')


def main(arguments=None) -> int:
    """Run the tool; returns the exit code."""
    return cli.run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

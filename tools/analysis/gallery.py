"""Make every picture of the documentation's gallery from what `make demo` trained.

python tools/analysis/gallery.py [--demo demo_output] [--out-dir demo_output/gallery]

Trains what the demo's classifier is compared with first: a ResNet of its size, and both of them at 64 pixels, where
test resolutions can differ.  Then runs the tools on the checkpoints, and writes a folder a tool and gallery.json, the
commands and their times.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import mmcv
import numpy as np

from mmvmamba import cli

ROOT = Path(__file__).resolve().parents[2]
TRAINED = {
    'resnet': ROOT / 'configs/demo/resnet18_1xb64_digits-32px.py',
    'resnet-64px': ROOT / 'configs/demo/resnet18_1xb64_digits-64px.py',
    'vmamba-64px': ROOT / 'configs/demo/vmamba-nano_1xb64_digits-64px.py',
}
# parts of the demo's pictures: two images and their classes, a scene and its prediction, a truth and its prediction
PANELS = {
    'classification': (0.25, 0.04, 0.75, 0.52),
    'detection': (0.01, 0.268, 0.488, 0.508),
    'segmentation': (0.01, 0.268, 0.488, 0.508),
}
QUICK = ['train_cfg.max_epochs=1', 'default_hooks.checkpoint.interval=1', 'train_dataloader.batch_size=8']
QUICK += ['param_scheduler=None', *(f'{name}_dataloader.dataset.indices=16' for name in ('train', 'val'))]


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--demo', type=Path, default=Path('demo_output'), help='what the demo wrote (default: %(default)s)'
    )
    parser.add_argument('--data', type=Path, default=Path('data/digits'), help='its data set (default: %(default)s)')
    parser.add_argument('--out-dir', type=Path, help='where the pictures go (default: gallery in --demo)')
    parser.add_argument('--force', action='store_true', help='replace the pictures that --out-dir holds')
    parser.add_argument(
        '--quick', action='store_true', help='train on a few images for one epoch, to check that everything runs'
    )
    return parser.parse_args(arguments)


def trained(demo: Path, task: str) -> tuple:
    """The config and checkpoint that the demo left for a task."""
    folder = demo / 'work_dirs' / task
    pointer, configs = folder / 'last_checkpoint', sorted(folder.glob('*.py'))
    if not pointer.is_file() or not configs:
        raise cli.UserError(f'--demo {str(demo)!r} has no trained work_dirs/{task}; run make demo first')
    return configs[0], folder / Path(pointer.read_text().strip()).name


def pixel_of_a_digit(mask: Path) -> tuple:
    """X and Y of the digit's pixel that lies nearest to the middle of all digits in a semantic mask."""
    digits = np.argwhere(mmcv.imread(str(mask), 'unchanged'))
    if not len(digits):
        raise cli.UserError(f'--data has no digit in {mask}; expected what make demo made')
    middle = (digits.max(axis=0) + digits.min(axis=0)) / 2
    row, column = digits[((digits - middle) ** 2).sum(axis=1).argmin()]
    return column, row


def commands(args: argparse.Namespace, out_dir: Path) -> dict:
    """The command of each picture, as lists of words after the interpreter."""
    tools, data = ROOT / 'tools', args.data
    digits, detector, segmentor = (trained(args.demo, task) for task in ('classification', 'detection', 'segmentation'))
    image, mask = data / 'scenes/val/00000.png', data / 'semantic/val/00000.png'
    if not (image.is_file() and mask.is_file()):
        raise cli.UserError(f'--data {str(data)!r} has no {{scenes,semantic}}/val/00000.png; run make demo first')
    train, compared = {}, {}
    for name, config in TRAINED.items():
        folder = out_dir / 'work_dirs' / name
        epochs = 1 if args.quick else cli.read_config(str(config)).train_cfg.max_epochs
        compared[name] = config, folder / f'epoch_{epochs}.pth'
        train[name] = [tools / 'train.py', config, '--work-dir', folder]
        train[name] += ['--cfg-options', *QUICK] if args.quick else []
    resnet, trained_pair = TRAINED['resnet'], ('--model', 'VMamba', *digits, '--model', 'ResNet', *compared['resnet'])
    pair_64 = ('--model', 'VMamba', *compared['vmamba-64px'], '--model', 'ResNet', *compared['resnet-64px'])
    untrained = [
        *('--model', 'VMamba, untrained', digits[0], 'none'),
        *('--model', 'ResNet, untrained', resnet, 'none'),
    ]
    logs = sorted(args.demo.glob('work_dirs/classification/*/vis_data/scalars.json'))[-1:]
    made = {
        'erf': [tools / 'analysis/erf.py', *untrained, *trained_pair, '--images', data / 'scenes/val'],
        'attention_map': [tools / 'analysis/attention_map.py', *detector, image, '--pixel', *pixel_of_a_digit(mask)],
        'feature_map': [tools / 'analysis/feature_map.py', *segmentor, image],
        'robustness_resolution': [
            *(tools / 'analysis/robustness_resolution.py', *pair_64, '--data', data / 'classification/val'),
            *('--sizes', '32', '48', '64', '80', '96', '128', '160', '--crop-ratio', '1'),
        ],
        'throughput': [
            *(tools / 'analysis/throughput.py', '--model', 'VMamba', digits[0]),
            *('--model', 'ResNet', resnet, '--batch-size', '16', '--sizes', '64', '128'),
            *('--mixed-sizes', '64', '96', '128', '--warmup', '2', '--steps', '5'),
        ],
    }
    for name, words in made.items():
        words += ['--out-dir', out_dir / name, '--force']
    if logs:
        curves = out_dir / 'curves.png'
        made['curves'] = ['-m', 'mim', 'run', 'mmpretrain', 'analyze_logs', 'plot_curve', logs[0], '--keys', 'loss']
        made['curves'] += ['--out', curves]
    return {name: [str(word) for word in words] for name, words in {**train, **made}.items()}


def draw_tasks(demo: Path, path: Path, height: int = 240) -> None:
    """One picture of the three tasks, from those that the demo drew."""
    panels = []
    for task, (left, top, right, bottom) in PANELS.items():
        picture = mmcv.imread(str(demo / f'{task}.png'))
        rows, columns = picture.shape[:2]
        panel = picture[int(top * rows) : int(bottom * rows), int(left * columns) : int(right * columns)]
        panels += [mmcv.imrescale(panel, (height, 10**6)), np.full((height, 12, 3), 255, np.uint8)]
    mmcv.imwrite(np.concatenate([panel[:height] for panel in panels[:-1]], axis=1), str(path))


def run(args: argparse.Namespace) -> None:
    """Run every tool; the first that fails stops the gallery."""
    out_dir = args.out_dir or args.demo / 'gallery'
    cli.check_out_dir(out_dir, args.force)
    planned = commands(args, out_dir)
    cli.make_out_dir(out_dir)
    record = {}
    for i, (name, words) in enumerate(planned.items(), start=1):
        print(f'[{i}/{len(planned)}] python {shlex.join(words)}', flush=True)
        start = time.time()
        with (out_dir / f'{name}.log').open('w') as log:
            code = subprocess.run(
                [sys.executable, '-W', 'ignore', *words], stdout=log, stderr=subprocess.STDOUT
            ).returncode
        if code:
            raise cli.UserError(f'{name} failed with exit code {code}; its log is {out_dir / name}.log')
        record[name] = dict(command=shlex.join(['python', *words]), seconds=round(time.time() - start))
    draw_tasks(args.demo, out_dir / 'tasks.jpg')
    (out_dir / 'gallery.json').write_text(json.dumps(record, indent=2) + '\n')
    print('\n'.join(f'wrote {path}' for path in sorted(out_dir.rglob('*.png')) if 'work_dirs' not in path.parts))


def main(arguments=None) -> int:
    """Run the tool; returns the exit code."""
    return cli.run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

"""Make every picture of the documentation's gallery from what `make demo` trained.

python tools/analysis/gallery.py [--demo demo_output] [--out-dir demo_output/gallery]

Trains a ResNet of the demo classifier's size first, to compare with; then runs the tools on the demo's checkpoints, and
writes a folder a tool and gallery.json, the commands and their times.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from mmvmamba.analysis import command

ROOT = Path(__file__).resolve().parents[2]
RESNET = ROOT / 'configs/demo/resnet18_1xb64_digits-32px.py'


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--demo', type=Path, default=Path('demo_output'), help='what the demo wrote (default: %(default)s)'
    )
    parser.add_argument('--data', type=Path, default=Path('data/digits'), help='its data set (default: %(default)s)')
    parser.add_argument('--out-dir', type=Path, help='where the pictures go (default: gallery in --demo)')
    parser.add_argument('--force', action='store_true', help='replace the pictures that --out-dir holds')
    return parser.parse_args(arguments)


def trained(demo: Path, task: str) -> tuple:
    """The config and checkpoint that the demo left for a task."""
    folder = demo / 'work_dirs' / task
    pointer, configs = folder / 'last_checkpoint', sorted(folder.glob('*.py'))
    if not pointer.is_file() or not configs:
        raise command.ToolError(f'--demo {str(demo)!r} has no trained work_dirs/{task}; run make demo first')
    return configs[0], folder / Path(pointer.read_text().strip()).name


def commands(args: argparse.Namespace, out_dir: Path) -> dict:
    """The command of each picture, as lists of words after the interpreter."""
    tools, data = ROOT / 'tools', args.data
    digits, detector, segmentor = (trained(args.demo, task) for task in ('classification', 'detection', 'segmentation'))
    image = sorted((data / 'scenes/val').glob('*.png'))[2:3]
    if not image:
        raise command.ToolError(f'--data {str(data)!r} has no scenes/val/*.png; run make demo first')
    resnet = out_dir / 'work_dirs/resnet'
    epochs = command.read_config(str(RESNET)).train_cfg.max_epochs  # as many as the demo's classifier
    both = [
        *('--model', 'VMamba', *digits),
        *('--model', 'ResNet', RESNET, resnet / f'epoch_{epochs}.pth'),
    ]
    untrained = [
        *('--model', 'VMamba, untrained', digits[0], 'none'),
        *('--model', 'ResNet, untrained', RESNET, 'none'),
    ]
    logs = sorted(args.demo.glob('work_dirs/classification/*/vis_data/scalars.json'))[-1:]
    made = {
        'resnet': [tools / 'train.py', RESNET, '--work-dir', resnet],
        'erf': [tools / 'analysis/erf.py', *untrained, *both, '--images', data / 'scenes/val', '--size', '224'],
        'attention_map': [tools / 'analysis/attention_map.py', *detector, image[0]],
        'feature_map': [tools / 'analysis/feature_map.py', *segmentor, image[0]],
        'robustness_resolution': [
            *(tools / 'analysis/robustness_resolution.py', *both, '--data', data / 'classification/val'),
            *('--sizes', '16', '24', '32', '48', '64', '96', '128', '--crop-ratio', '1'),
        ],
        'throughput': [
            *(tools / 'analysis/throughput.py', '--model', 'VMamba', digits[0]),
            *('--model', 'ResNet', RESNET, '--batch-size', '16', '--sizes', '64', '128'),
            *('--mixed-sizes', '64', '96', '128', '--warmup', '2', '--steps', '5'),
        ],
    }
    for name, words in made.items():
        if name != 'resnet':
            words += ['--out-dir', out_dir / name, '--force']
    if logs:
        curves = out_dir / 'curves.png'
        made['curves'] = ['-m', 'mim', 'run', 'mmpretrain', 'analyze_logs', 'plot_curve', logs[0], '--keys', 'loss']
        made['curves'] += ['--out', curves]
    return {name: [str(word) for word in words] for name, words in made.items()}


def run(args: argparse.Namespace) -> None:
    """Run every tool; the first that fails stops the gallery."""
    out_dir = args.out_dir or args.demo / 'gallery'
    command.check_out_dir(out_dir, args.force)
    planned = commands(args, out_dir)
    command.make_out_dir(out_dir)
    record = {}
    for i, (name, words) in enumerate(planned.items(), start=1):
        print(f'[{i}/{len(planned)}] python {shlex.join(words)}', flush=True)
        start = time.time()
        with (out_dir / f'{name}.log').open('w') as log:
            code = subprocess.run(
                [sys.executable, '-W', 'ignore', *words], stdout=log, stderr=subprocess.STDOUT
            ).returncode
        if code:
            raise command.ToolError(f'{name} failed with exit code {code}; its log is {out_dir / name}.log')
        record[name] = dict(command=shlex.join(['python', *words]), seconds=round(time.time() - start))
    (out_dir / 'gallery.json').write_text(json.dumps(record, indent=2) + '\n')
    print('\n'.join(f'wrote {path}' for path in sorted(out_dir.rglob('*.png')) if 'work_dirs' not in path.parts))


def main(arguments=None) -> int:
    """Run the tool; returns the exit code."""
    args = parse_args(arguments)
    return command.run_tool(lambda: run(args))


if __name__ == '__main__':
    sys.exit(main())

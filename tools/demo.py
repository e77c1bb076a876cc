"""The demo: train and evaluate VMamba on real images in three tasks, and show what came out.

Makes the digits data set, runs ``mim train`` and ``mim test`` for a classifier, a Mask R-CNN and a UperNet, and writes
to ``demo_output/``: metrics.md and metrics.json, losses.png, one picture of predictions a task, logs and checkpoints.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from mmvmamba.cli import UserError, pyplot, run_tool

ROOT = Path(__file__).resolve().parents[1]
DATA = Path('data/digits')
SHOWN = 8  # validation images in a picture


# a few images; names of settings that a data set of any of the three codebases takes
QUICK = (*(f'{name}_dataloader.dataset.indices=16' for name in ('train', 'val', 'test')), 'param_scheduler=None')
ONE_EPOCH = ('train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'default_hooks.checkpoint.interval=1')
TWO_STEPS = ('train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=2')


@dataclass(frozen=True)
class Task:
    """A task of the demo.

    Attributes:
        name (str): Its name.
        codebase (str): Who runs it.
        config (str): Its config.
        metrics (tuple): What to report, as (key in the log, name, factor).
        quick (tuple[str, ...]): Settings of a training of a few steps, on top of ``QUICK``.
    """

    name: str
    codebase: str
    config: str
    metrics: tuple
    quick: tuple


TASKS = (
    Task(
        'classification',
        'mmpretrain',
        'configs/demo/vmamba-nano_1xb64_digits-32px.py',
        (('accuracy/top1', 'top-1', 0.01),),
        (*ONE_EPOCH, 'train_dataloader.batch_size=8', 'default_hooks.logger.interval=1'),
    ),
    Task(
        'detection',
        'mmdet',
        'configs/demo/mask-rcnn_vmamba-nano_fpn_1xb8-1e_digits.py',
        (
            ('coco/bbox_mAP', 'box AP', 1),
            ('coco/bbox_mAP_50', 'box AP50', 1),
            ('coco/segm_mAP', 'mask AP', 1),
            ('coco/segm_mAP_50', 'mask AP50', 1),
        ),
        (*ONE_EPOCH, 'default_hooks.logger.interval=1'),
    ),
    Task(
        'segmentation',
        'mmsegmentation',
        'configs/demo/vmamba-nano_upernet_1xb4-4k_digits-128x128.py',
        (('mIoU', 'mIoU', 0.01), ('aAcc', 'pixel accuracy', 0.01)),
        (*TWO_STEPS, 'default_hooks.logger.interval=1'),
    ),
)


def say(message: str) -> None:
    """Print a line now."""
    print(f'[demo] {message}', flush=True)


def run(step: str, command: list, log: Path) -> float:
    """Run a command with its output in a log file, showing progress lines; returns the seconds it took."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start, tail, shown = time.time(), deque(maxlen=60), 0.0
    environment = dict(os.environ, PYTHONUNBUFFERED='1', PYTHONWARNINGS='ignore')
    with log.open('w') as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, errors='replace'
        )
        try:
            for line in process.stdout:
                file.write(line)
                tail.append(line)
                progress = re.search(r'((?:Epoch|Iter)\((?:train|val|test)\).*)', line)
                if progress and (time.time() - shown > 10 or '(train)' not in line):
                    say(f'  {progress.group(1).strip()[:150]}')
                    shown = time.time()
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code:
        print(''.join(tail), file=sys.stderr)
        raise UserError(f'{step} failed with exit code {code}; its whole log is {log}')
    return time.time() - start


def keep_earlier(out_dir: Path) -> None:
    """Move the results of an earlier run aside."""
    if out_dir.exists():
        stamp = datetime.fromtimestamp(out_dir.stat().st_mtime).strftime('%Y%m%d-%H%M%S')
        kept = out_dir.with_name(f'{out_dir.name}-{stamp}')
        out_dir.rename(kept)
        say(f'the results of an earlier run are kept in {kept}')


def make_data(out_dir: Path) -> None:
    """Make the data set unless it is there."""
    if DATA.is_dir():
        say(f'using the data set in {DATA}')
        return
    say(f'making the digits data set in {DATA}')
    run(
        'making the data set',
        [sys.executable, str(ROOT / 'tools/dataset_converters/digits.py')],
        out_dir / 'logs/data.log',
    )


def train_and_test(task: Task, out_dir: Path, quick: bool = False) -> dict:
    """Run a task; returns its metrics and times."""
    options = ['--cfg-options', *QUICK, *task.quick] if quick else []
    gpus = '1' if torch.cuda.is_available() else '0'
    mim, config, work_dir = [sys.executable, '-m', 'mim'], str(ROOT / task.config), out_dir / 'work_dirs' / task.name
    say(f'{task.name}: mim train {task.codebase} {task.config}')
    train_time = run(
        f'training ({task.name})',
        [*mim, 'train', task.codebase, config, '--gpus', gpus, '--work-dir', str(work_dir), *options],
        out_dir / f'logs/{task.name}-train.log',
    )
    checkpoint = (work_dir / 'last_checkpoint').read_text().strip()
    say(f'{task.name}: mim test {task.codebase} {task.config} --checkpoint {checkpoint}')
    test_dir = work_dir / 'test'
    test_time = run(
        f'testing ({task.name})',
        [*mim, 'test', task.codebase, config, '--checkpoint', checkpoint, '--gpus', gpus, '--work-dir', str(test_dir)]
        + ['--show-dir', str((test_dir / 'shown').resolve()), *options],
        out_dir / f'logs/{task.name}-test.log',
    )
    logged = json.loads(max(test_dir.glob('*/*.json'), key=os.path.getmtime).read_text())
    return dict(
        metrics={name: round(logged[key] * factor, 4) for key, name, factor in task.metrics},
        train_seconds=round(train_time),
        test_seconds=round(test_time),
        checkpoint=checkpoint,
    )


def read_losses(work_dir: Path) -> tuple:
    """Iterations and training losses that the Runner logged."""
    log = max(work_dir.glob('*/vis_data/scalars.json'), key=os.path.getmtime)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    points = [(row.get('step', row.get('iter')), row['loss']) for row in rows if 'loss' in row]
    return tuple(zip(*points))


def draw_losses(results: dict, out_dir: Path) -> None:
    """Draw the loss curves of all tasks into one picture."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 3.5), layout='constrained', squeeze=False)
    for axis, name in zip(axes[0], results):
        axis.plot(*read_losses(out_dir / 'work_dirs' / name))
        axis.set(title=name, xlabel='iteration', ylabel='training loss', ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.savefig(out_dir / 'losses.png', dpi=120)
    plt.close(figure)


def draw_predictions(task: str, out_dir: Path) -> None:
    """Lay out some of the images that the test drew; those of detection and segmentation are pairs."""
    plt = pyplot()
    pictures = sorted((out_dir / 'work_dirs' / task / 'test/shown').rglob('*.png'))
    if not pictures:
        raise UserError(f'the {task} test drew no predictions; see logs/{task}-test.log')
    chosen = pictures[:: max(1, len(pictures) // SHOWN)][:SHOWN]
    columns = 4 if task == 'classification' else 2
    rows = -(-len(chosen) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(12, 3 * rows), layout='constrained', squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    for axis, picture in zip(axes.flat, chosen):
        axis.imshow(plt.imread(picture))
    left = dict(detection='image left, ', segmentation='truth left, ').get(task, '')
    figure.suptitle(f'{task}: {left}prediction{" right" if left else ""}')
    figure.savefig(out_dir / f'{task}.png', dpi=120)
    plt.close(figure)


def write_metrics(results: dict, out_dir: Path) -> str:
    """Write metrics.json and metrics.md; returns the table."""
    lines = ['| task | metric | held-out scans | training, s | testing, s |', '|---|---|---|---|---|']
    for task, result in results.items():
        for i, (name, value) in enumerate(result['metrics'].items()):
            times = f'{result["train_seconds"]} | {result["test_seconds"]}' if i == 0 else '|'
            lines.append(f'| {task if i == 0 else ""} | {name} | {value:.3f} | {times} |')
    table = '\n'.join(lines)
    (out_dir / 'metrics.json').write_text(json.dumps(results, indent=2) + '\n')
    (out_dir / 'metrics.md').write_text(table + '\n')
    return table


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out-dir', type=Path, default=Path('demo_output'), help='default: %(default)s')
    names = [task.name for task in TASKS]
    parser.add_argument('--tasks', nargs='+', choices=names, default=names, help='default: all three')
    parser.add_argument(
        '--quick', action='store_true', help='use a few images and steps, to check that everything runs'
    )
    return parser.parse_args(arguments)


def demonstrate(args: argparse.Namespace) -> None:
    """Run the tasks, and say where to look."""
    start, results = time.time(), {}
    keep_earlier(args.out_dir)
    make_data(args.out_dir)
    for task in TASKS:
        if task.name in args.tasks:
            results[task.name] = train_and_test(task, args.out_dir, args.quick)
            draw_predictions(task.name, args.out_dir)
    draw_losses(results, args.out_dir)
    print(write_metrics(results, args.out_dir))
    say(f'{time.time() - start:.0f} s. Look at:')
    for name in ('metrics.md', 'losses.png', *(f'{task}.png' for task in results)):
        say(f'  {args.out_dir / name}')
    say(f'  {args.out_dir / "work_dirs"} (logs and checkpoints)')


def main(arguments=None) -> int:
    """Run the demo; returns the exit code."""
    try:
        return run_tool(demonstrate, parse_args(arguments))
    except KeyboardInterrupt:
        print('[demo] interrupted', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())

"""Whether the fast training loop learns as mmengine's own: losses of the demo's three tasks, by both.

    python tools/dataset_converters/digits.py
    python tools/benchmark/losses.py --amp --out benchmarks/results/losses.json

Each task trains by mmengine's way with three seeds, and the fast way (fused step, deferred losses, prefetching, foreach
averages, compiled backbone) with the first of them.  The distance of two runs is the mean difference of their losses,
smoothed over 20 iterations.  The fast run may be no farther from the plain run of its seed than plain runs of different
seeds are from each other; otherwise the exit code is 1.
"""

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import report
import torch
from clock import Enough
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope
from training import without_new_transformers

from mmvmamba.cli.launch import build_runner

DEMO = Path(__file__).resolve().parents[2] / 'configs/demo'
TASKS = dict(
    classification='vmamba-nano_1xb64_digits-32px.py',
    detection='mask-rcnn_vmamba-nano_fpn_1xb8-1e_digits.py',
    segmentation='vmamba-nano_upernet_1xb4-4k_digits-128x128.py',
)
SEEDS = (0, 1, 2)
WINDOW = 20


class Losses(Hook):
    """Keeps the loss of each iteration, and ends the run after some."""

    priority = 'LOWEST'

    def __init__(self, iterations: int):
        self.iterations, self.kept = iterations, []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.kept.append(outputs['loss'].detach().clone())
        if len(self.kept) == self.iterations:
            raise Enough


def prepare(task: str, fast: bool, seed: int, args) -> Config:
    """The demo's config of a task, trained by mmengine's way or the fast one."""
    cfg = Config.fromfile(DEMO / TASKS[task])
    cfg.merge_from_dict(args.cfg_options or {})
    for phase in ('val', 'test'):
        for part in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{phase}_{part}'] = None
    cfg.randomness, cfg.log_level, cfg.launcher = dict(seed=seed), 'WARNING', 'none'
    cfg.experiment_name = f'{task}-{fast}-{seed}-{time.time_ns()}'
    cfg.optim_wrapper.type = 'mmvmamba.FastOptimWrapper' if fast else 'AmpOptimWrapper' if args.amp else 'OptimWrapper'
    if args.amp:
        cfg.optim_wrapper.update(dict(dtype='float16', loss_scale='dynamic'))
    cfg.optim_wrapper.optimizer.fused = fast
    average = dict(type='EMAHook', momentum=1e-3)
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), average]
    if fast:
        average['ema_type'] = 'mmvmamba.ForeachEMA'
        compiled = dict(type='mmvmamba.CompileHook', dynamic=task == 'detection', backend=args.backend)
        cfg.custom_hooks += [dict(type='mmvmamba.PrefetchHook'), compiled]
        cfg.setdefault('default_hooks', {})['runtime_info'] = dict(type='mmvmamba.DeferredInfoHook')
        cfg.train_dataloader.pin_memory = torch.cuda.is_available()
    return cfg


def train(task: str, fast: bool, seed: int, args) -> np.ndarray:
    """The losses of a run."""
    torch._dynamo.reset()
    cfg, losses = prepare(task, fast, seed, args), Losses(args.iterations)
    with tempfile.TemporaryDirectory() as folder, DefaultScope.overwrite_default_scope(cfg.default_scope):
        cfg.work_dir = folder
        with without_new_transformers():
            runner = build_runner(cfg)
        runner.register_hook(losses)
        with contextlib.suppress(Enough):
            runner.train()
    return torch.stack(losses.kept).double().cpu().numpy()


def distance(one: np.ndarray, two: np.ndarray) -> float:
    """Mean difference of two runs' smoothed losses."""
    window = min(WINDOW, len(one), len(two))
    count = min(len(one), len(two))
    smooth = [np.convolve(losses[:count], np.full(window, 1 / window), 'valid') for losses in (one, two)]
    return float(np.abs(smooth[0] - smooth[1]).mean())


def compare(task: str, args) -> dict:
    """The row of a task."""
    plain = [train(task, False, seed, args) for seed in SEEDS]
    fast = train(task, True, SEEDS[0], args)
    noise = [distance(one, two) for one, two in itertools.combinations(plain, 2)]
    return dict(
        task=task,
        iterations=len(fast),
        distance=distance(fast, plain[0]),
        noise=noise,
        within=bool(np.isfinite(fast).all() and distance(fast, plain[0]) <= max(noise)),
        last=[float(losses[-WINDOW:].mean()) for losses in (fast, *plain)],
    )


def parse_args(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tasks', nargs='+', choices=list(TASKS), default=list(TASKS))
    parser.add_argument('--iterations', type=int, default=300)
    parser.add_argument('--amp', action='store_true', help='mixed precision, both ways (GPU)')
    parser.add_argument('--backend', default='inductor', help='of torch.compile')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE')
    parser.add_argument('--out', type=Path, metavar='FILE', help='write the rows to this JSON file')
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Compare; 1 if a task is out of the noise."""
    args = parse_args(argv)
    rows = []
    for task in args.tasks:
        rows.append(compare(task, args))
        print(rows[-1], flush=True)
    print('\n| task | fast from plain | plain from plain | last losses: fast, plain | within |\n|---|---|---|---|---|')
    for row in rows:
        noise, last = (', '.join(f'{value:.4f}' for value in row[key]) for key in ('noise', 'last'))
        print(f'| {row["task"]} | {row["distance"]:.4f} | {noise} | {last} | {"yes" if row["within"] else "no"} |')
    if args.out is not None:
        report.write(args.out, 'cuda' if torch.cuda.is_available() else 'cpu', rows)
    return 0 if all(row['within'] for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())

"""Speed of training as a user runs it: configs of the three codebases through mmengine's Runner.

    python tools/benchmark/training.py configs/classification/vmamba-tiny-s1l8_8xb128-amp_in1k.py \\
        mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py train_dataloader.batch_size=128 --amp \\
        --baseline swin-tiny_16xb64_in1k --out benchmarks/results/training.json

KEY=VALUE after a config changes a setting of that config; ``as=NAME`` there names its row.  A run is the whole of it:
data loader, preprocessing, optimizer, averaged weights, clipping, hooks and log; only evaluation is left out, and
weights are random.  Images are random pixels of the config's shapes, for detection of changing sizes and with as many
objects as COCO's; ``--data config`` takes the config's own data set.

A row has the median iteration; images a second; how much of it the device is busy; launches; memory; an iteration by
phase and by hook, each with a wait for the device, and how long the host takes for each phase; the ratio to the
baseline; and the ratio to the bare step of the same model on a batch that is on the device: forward, loss and backward,
in eager mode and with the backbone compiled.  ``host`` is the time of the bare step in eager mode on images so small
that the device never limits.
Under torchrun it measures DistributedDataParallel; images a second are those of all processes.
"""

import argparse
import contextlib
import copy
import gc
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import report
import torch
from clock import Clock, Enough, synchronize
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope
from synthetic import KINDS, find_classes, find_sizes

from mmvmamba.cli.launch import build_runner, use_loader_defaults
from mmvmamba.cli.models import _forget_pretrained, read_config
from mmvmamba.training.compiling import CompiledForward, restore_modules

BATCHES = 4  # of the bare step
SAMPLES = 200_000  # of an epoch, about as many as COCO has; schedules depend on it
SMALL = dict(mmpretrain=None, mmdet=160, mmseg=128)  # sides of images of which the host is the limit


@contextlib.contextmanager
def without_new_transformers():
    """mmpretrain 1.2 cannot be imported beside transformers 5; while it is, let it find none."""
    import importlib.metadata as standard

    modules = [standard]
    with contextlib.suppress(ImportError):
        import importlib_metadata

        modules.append(importlib_metadata)
    with contextlib.ExitStack() as stack:
        for module in modules:
            find = module.distribution

            def hidden(name, find=find, module=module):
                if name == 'transformers' and int(find(name).version.split('.')[0]) >= 5:
                    raise module.PackageNotFoundError(name)
                return find(name)

            module.distribution = hidden
            stack.callback(setattr, module, 'distribution', find)
        yield


def parse_args(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', metavar='CONFIG [KEY=VALUE ...]', help='path, or SCOPE::NAME')
    parser.add_argument('--baseline', metavar='NAME', help='the row of the ratios, by its name')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='for all configs')
    parser.add_argument('--amp', action='store_true', help='mixed precision for configs that have none')
    parser.add_argument('--data', choices=('synthetic', 'config'), default='synthetic')
    parser.add_argument('--batch', type=int, help="instead of the configs' own batch sizes")
    parser.add_argument('--pixels', type=int, help="side of images instead of the configs', of detection the shorter")
    parser.add_argument('--workers', type=int, help="instead of the configs' own number of data-loader workers")
    parser.add_argument('--warmup', type=int, default=30)
    parser.add_argument('--iterations', type=int, default=60)
    parser.add_argument('--phases', type=int, default=10, help='iterations by phase; 0 for none')
    parser.add_argument('--no-profile', action='store_true', help='no busy share, no launches')
    parser.add_argument('--bare', nargs='*', choices=('eager', 'compile', 'host'), default=('eager', 'compile', 'host'))
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', type=Path, metavar='FILE', help='write the rows to this JSON file')
    parser.add_argument('--add', action='store_true', help='keep the rows that FILE has, if it is of the same build')
    args = parser.parse_args(argv)
    args.runs = []
    for word in args.configs:
        if '=' not in word:
            args.runs.append((word, []))
        elif not args.runs:
            parser.error(f'{word!r} comes before any config, expected CONFIG KEY=VALUE')
        else:
            args.runs[-1][1].append(word)
    if args.iterations < 2 or args.warmup < 1:
        parser.error(f'--iterations is {args.iterations} and --warmup {args.warmup}, expected at least 2 and 1')
    return args


def prepare(config: str, options: list, args) -> tuple:
    """A config with what the command line asks for, and the name of its row."""
    cfg = read_config(config)
    own = dict(word.split('=', 1) for word in options)
    name = own.pop('as', Path(config.split('::')[-1]).stem)
    parsed = {key: DictAction._parse_iterable(value) for key, value in own.items()}
    cfg.merge_from_dict({**(args.cfg_options or {}), **parsed})
    _forget_pretrained(cfg.model)
    if args.amp and cfg.optim_wrapper.get('type', 'OptimWrapper') == 'OptimWrapper':
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    for phase in ('val', 'test'):
        for part in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{phase}_{part}'] = None
    cfg.load_from, cfg.resume = None, False
    cfg.log_level = 'WARNING'  # the log is made, but not shown
    cfg.launcher = 'pytorch' if 'RANK' in os.environ else 'none'
    loader = cfg.train_dataloader
    if args.batch:
        loader.batch_size = args.batch
    if args.workers is not None:
        loader.num_workers = args.workers
    use_loader_defaults(cfg)
    if not loader.num_workers:
        for key in ('persistent_workers', 'prefetch_factor'):
            loader.pop(key, None)
    if 'visualizer' in cfg:
        cfg.visualizer.pop('name', None)  # it would be the one of the run before, which writes into that run's folder
    cfg.experiment_name = f'{name}-{time.time_ns()}'  # mmengine keeps its message hub under this name
    return cfg, name


def use_synthetic_data(cfg: Config, args) -> None:
    """Replace a config's data set by random pixels."""
    loader = cfg.train_dataloader
    loader.pop('batch_sampler', None)
    loader.dataset = dict(
        type=KINDS[cfg.default_scope],
        length=SAMPLES,
        sizes=find_sizes(cfg, args.pixels),
        batch=loader.batch_size,
        classes=find_classes(cfg),
    )
    loader.sampler = dict(type='DefaultSampler', shuffle=False)


def measure(config: str, options: list, args) -> dict:
    """Run and time one config."""
    cfg, name = prepare(config, options, args)
    if args.data == 'synthetic':
        use_synthetic_data(cfg, args)
    with tempfile.TemporaryDirectory() as folder, DefaultScope.overwrite_default_scope(cfg.default_scope):
        cfg.work_dir = folder
        with without_new_transformers():
            runner = build_runner(cfg)
        clock = Clock(args.device, args.warmup, args.iterations, args.phases, not args.no_profile)
        runner.register_hook(clock)
        with contextlib.suppress(Enough):
            runner.train()
        row = summarize(name, config, options, cfg, clock)
        restore_modules(runner.model.modules())
        if int(os.environ.get('WORLD_SIZE', 1)) == 1:
            bare_steps(runner, row, args)
    return row


def summarize(name: str, config: str, options: list, cfg: Config, clock: Clock) -> dict:
    """The row of a run."""
    times = clock.iterations()
    processes = int(os.environ.get('WORLD_SIZE', 1))
    images = cfg.train_dataloader.batch_size * processes
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (median,) * 3
    mean = 1e3 * clock.wall / len(times)
    row = dict(
        name=name,
        config=config,
        options=options,
        processes=processes,
        batch=cfg.train_dataloader.batch_size,
        iteration_ms=median,
        mean_ms=mean,
        quartiles_ms=[low, high],
        images_per_second=1e3 * images / median,
        images_per_second_mean=1e3 * images / mean,
        peak_gib=clock.peak,
        reserved_gib=clock.reserved,
        phases_ms=clock.phases.milliseconds(),
        phases_host_ms=clock.phases.host_milliseconds(),
        hooks_ms=clock.phases.hook_milliseconds(),
    )
    if clock.kernels.get('busy_ms'):
        row.update(clock.kernels, busy=min(clock.kernels['busy_ms'] / median, 1.0))
    return row


def bare_steps(runner, row: dict, args) -> None:
    """Add to a row the bare step of the run's model: in eager mode, compiled, and on tiny images."""
    model, wrapper = runner.model, runner.optim_wrapper
    data = runner.train_dataloader.dataset
    dynamic = len(getattr(data, 'sizes', ())) > 1
    parts = [range(i * row['batch'], (i + 1) * row['batch']) for i in range(BATCHES if dynamic else 1)]
    batches = [_preprocess(runner, [data[i] for i in part]) for part in parts]
    if 'eager' in args.bare:
        row['bare_eager_ms'] = time_bare(model, wrapper, batches, args)
        row['of_bare_eager'] = row['bare_eager_ms'] / row['iteration_ms']
    if 'host' in args.bare:
        side = SMALL[runner.cfg.default_scope]
        small = copy.copy(data)
        if side and hasattr(data, 'sizes'):
            small.sizes = [(min(side, h), min(round(1.2 * side), w)) for h, w in data.sizes[:1]]
        row['host_ms'] = time_host(model, wrapper, _preprocess(runner, [small[i] for i in range(2)]), args)
    if 'compile' in args.bare and hasattr(model, 'backbone'):
        torch._dynamo.reset()
        compiled = CompiledForward(model.backbone, 'backbone', dynamic=dynamic)
        model.backbone.forward = compiled
        milliseconds = time_bare(model, wrapper, batches, args)
        if not compiled.failed:
            row['bare_compiled_ms'] = milliseconds
            row['of_bare_compiled'] = milliseconds / row['iteration_ms']
        restore_modules([model.backbone])


def _preprocess(runner, samples: list) -> dict:
    with torch.no_grad():
        return runner.model.data_preprocessor(runner.train_dataloader.collate_fn(samples), True)


def bare_step(model, wrapper, batch: dict) -> None:
    """Forward, loss and backward; gradients are dropped, as the optimizer would."""
    with wrapper.optim_context(model):
        losses = model(**batch, mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    wrapper.optimizer.zero_grad()


def time_bare(model, wrapper, batches: list, args) -> float:
    """Milliseconds of the bare step, the median over repeats in which the host can run ahead."""
    model.train()
    for _ in range(max(args.warmup // 5, 1)):
        for batch in batches:
            bare_step(model, wrapper, copy.deepcopy(batch))
    repeats, calls, times = max(args.iterations // 6, 2), 6 if args.iterations >= 12 else 1, []
    for _ in range(repeats):
        copies = [copy.deepcopy(batches[i % len(batches)]) for i in range(max(calls, len(batches)))]
        synchronize(args.device)
        begin = time.perf_counter()
        for batch in copies:
            bare_step(model, wrapper, batch)
        synchronize(args.device)
        times.append(1e3 * (time.perf_counter() - begin) / len(copies))
    return statistics.median(times)


def time_host(model, wrapper, tiny: dict, args) -> float:
    """Milliseconds that the host takes for a bare step."""
    times = []
    for _ in range(max(args.warmup // 5, 1) + args.iterations // 3):
        batch = copy.deepcopy(tiny)
        synchronize(args.device)
        begin = time.perf_counter()
        bare_step(model, wrapper, batch)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[max(args.warmup // 5, 1) :] or times)


def add_ratios(rows: list, baseline: str) -> None:
    """Set each row's time over the baseline's, and its images a second over the baseline's."""
    base = next((row for row in rows if row['name'] == baseline), None)
    for row in rows:
        if base is not None:
            row['baseline'] = baseline
            row['time_ratio'] = row['iteration_ms'] / base['iteration_ms']
            row['speed_ratio'] = row['images_per_second'] / base['images_per_second']
            if row.get('host_ms') and base.get('host_ms'):
                row['host_ratio'] = row['host_ms'] / base['host_ms']


def format_table(rows: list) -> str:
    """Markdown tables of the rows: figures, and phases."""
    columns = dict(
        iteration_ms=('ms', '.1f'),
        mean_ms=('mean ms', '.1f'),
        images_per_second=('images/s', ',.0f'),
        busy=('device busy', '.0%'),
        busy_ms=('busy ms', '.1f'),
        launches=('launches', ',d'),
        peak_gib=('GiB', '.1f'),
        reserved_gib=('GiB reserved', '.1f'),
        of_bare_compiled=('of bare compiled', '.0%'),
        of_bare_eager=('of bare eager', '.0%'),
        host_ms=('host ms', '.1f'),
        time_ratio=('time ratio', '.2f'),
        speed_ratio=('speed ratio', '.2f'),
    )

    def cell(row, key, form):
        value = row.get(key)
        return '' if value is None else f'{value:{form}}'

    lines = [f'| run | {" | ".join(title for title, _ in columns.values())} |', f'|---{"|---" * len(columns)}|']
    lines += [f'| {r["name"]} | {" | ".join(cell(r, k, form) for k, (_, form) in columns.items())} |' for r in rows]
    names = list(dict.fromkeys(name for row in rows for name in row['phases_ms']))
    if names:
        lines += ['', f'| ms, one phase after the other | {" | ".join(names)} |', f'|---{"|---" * len(names)}|']
        lines += [
            f'| {row["name"]}{of} | {" | ".join(cell(row[key], name, ".1f") for name in names)} |'
            for row in rows
            for key, of in (('phases_ms', ''), ('phases_host_ms', ', until the host goes on'))
        ]
        for row in rows:
            hooks = ', '.join(f'{name} {value:.1f}' for name, value in row['hooks_ms'].items() if value >= 0.05)
            lines += ['', f'{row["name"]}, ms of its hooks: {hooks}']
    return '\n'.join(lines)


def main(argv=None) -> list:
    """Measure each config; returns the rows."""
    args = parse_args(argv)
    rows, is_first, interrupted = [], int(os.environ.get('RANK', 0)) == 0, False
    for config, options in args.runs:
        torch._dynamo.reset()
        try:
            rows.append(measure(config, options, args))
        except Exception:  # one that cannot run must not lose the others' figures
            traceback.print_exc()
            print(f'{config} {" ".join(options)}: no figures, see above', flush=True)
            continue
        except KeyboardInterrupt:
            print(f'interrupted in {config} {" ".join(options)}: the rows before it are kept', flush=True)
            interrupted = True
            break
        finally:
            gc.collect()
            if args.device == 'cuda':
                torch.cuda.empty_cache()
        if is_first:
            print(format_table(rows[-1:]), flush=True)
    if not rows:
        raise SystemExit('no config could be measured')
    add_ratios(rows, args.baseline or rows[0]['name'])
    if is_first:
        print(f'\n{report.machine_name(args.device)}, torch {torch.__version__}\n\n{format_table(rows)}')
        if args.out is not None:
            report.write(args.out, args.device, rows, args.add)
    if interrupted:
        raise SystemExit(130)
    return rows


if __name__ == '__main__':
    main()
    sys.exit()

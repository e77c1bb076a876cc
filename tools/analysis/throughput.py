"""Images a second and peak memory of models, in inference and training, over resolutions and precisions.

python tools/analysis/throughput.py --model VMamba-T CONFIG --model Swin-T mmpretrain::swin_transformer/NAME.py

The published protocol: batches of 128 random images, a warm-up, then the median time of a step.  Inference is the
forward pass; training is forward, loss, backward and an AdamW step; mixed training takes another resolution at every
step.  Classifiers run whole; of detectors and segmentors, backbone and neck.  A model whose outputs, loss or gradients
are not finite gets no figure.  Writes throughput.json, throughput.md and throughput.png.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import mmengine
import torch
import torch.nn.functional as F
from mmengine.utils import ProgressBar

import mmvmamba
from mmvmamba import cli
from mmvmamba.export.graphs import as_tuple

PRECISIONS = dict(fp32=None, tf32=None, fp16=torch.float16, bf16=torch.bfloat16)
MODES = ('inference', 'train', 'train-mixed')
COMPILE_MODES = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_models_argument(parser, checkpoint=False)
    parser.add_argument('--batch-size', type=int, default=128, help='default: %(default)s')
    parser.add_argument('--sizes', type=int, nargs='+', default=[224], help='side of the images (default: 224)')
    parser.add_argument(
        '--mixed-sizes', type=int, nargs='+', default=[224, 256, 288], help='of train-mixed (default: %(default)s)'
    )
    parser.add_argument(
        '--precisions', nargs='+', choices=list(PRECISIONS), default=['fp32'], help='fp16 and bf16 are autocast'
    )
    parser.add_argument('--modes', nargs='+', choices=MODES, default=list(MODES), help='default: all')
    parser.add_argument('--warmup', type=int, default=10, help='steps before the timing (default: %(default)s)')
    parser.add_argument('--steps', type=int, default=30, help='timed steps (default: %(default)s)')
    parser.add_argument('--channels-last', action='store_true', help='images and convolutions in channels_last memory')
    parser.add_argument('--compile', choices=COMPILE_MODES, help='torch.compile with this mode, anew for every case')
    cli.add_output_arguments(parser, 'analysis/throughput')
    return parser.parse_args(arguments)


class Bench:
    """Steps of one model in one precision.

    Args:
        model (nn.Module): Model of a codebase.
        precision (str): A key of ``PRECISIONS``.
        args (Namespace): The command line.
    """

    def __init__(self, model: torch.nn.Module, precision: str, args: argparse.Namespace):
        self.device, self.args = torch.device(args.device), args
        self.precision, self.dtype = precision, PRECISIONS[precision]
        self.layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.layout)
        forward = self._scores if hasattr(model, 'head') else self._maps
        # kernels for the very sizes, as they are measured
        self.forward = torch.compile(forward, mode=args.compile, dynamic=False) if args.compile else forward
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def _scores(self, x):
        return self.model(x, mode='tensor')

    def _maps(self, x):
        return self.model.extract_feat(x)

    def images(self, size) -> torch.Tensor:
        """Random images of one size: a side, or height and width."""
        height, width = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(height)
        x = torch.randn(self.args.batch_size, cli.image_channels(self.model), height, width, generator=generator)
        return x.to(self.device, memory_format=self.layout)

    def autocast(self):
        """The precision as a context."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def infer(self, x: torch.Tensor) -> tuple:
        """A forward pass; returns what it computed."""
        with torch.no_grad(), self.autocast():
            return as_tuple(self.forward(x))

    def train(self, x: torch.Tensor) -> tuple:
        """A training step; returns its loss and the norm of the gradients."""
        with self.autocast():
            outs = as_tuple(self.forward(x))
            if outs[-1].dim() == 2:
                labels = torch.arange(len(x), device=x.device) % outs[-1].shape[1]
                loss = F.cross_entropy(outs[-1].float(), labels)
            else:
                loss = sum(out.float().square().mean() for out in outs)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def measure(self, mode: str, sizes: list) -> dict:
        """Median time of a step, images a second and peak memory; a step takes the sizes in turn."""
        if self.args.compile:
            torch._dynamo.reset()  # an earlier case's graphs would hold memory, and count against the recompile limit
        self.model.train(mode != 'inference')
        step = self.infer if mode == 'inference' else self.train
        batches = [self.images(size) for size in sizes]
        on_gpu = self.device.type == 'cuda'
        bad = 0
        for i in range(max(self.args.warmup, len(batches))):
            outs = step(batches[i % len(batches)])
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        times = []
        for i in range(self.args.steps * len(batches)):
            self.synchronize()
            start = time.perf_counter()
            outs = step(batches[i % len(batches)])
            self.synchronize()
            times.append(time.perf_counter() - start)
            bad += sum(int((~out.isfinite()).sum()) for out in outs)
        if bad:
            return dict(error=f'{bad} values of its outputs, losses or gradients were not finite')
        # with mixed sizes one round of all of them counts as a step
        rounds = [sum(times[i : i + len(batches)]) / len(batches) for i in range(0, len(times), len(batches))]
        seconds = statistics.median(rounds)
        memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if on_gpu else None
        return dict(images_per_second=self.args.batch_size / seconds, seconds=seconds, peak_gib=memory)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)


def plan(args: argparse.Namespace) -> list:
    """What to measure of every model, as (mode, sizes)."""
    cases = [(mode, [size]) for mode in args.modes if mode != 'train-mixed' for size in args.sizes]
    return cases + ([('train-mixed', args.mixed_sizes)] if 'train-mixed' in args.modes else [])


def measure(args: argparse.Namespace) -> list:
    """Measure everything; returns a row a figure."""
    rows, cases = [], plan(args)
    bar = ProgressBar(len(args.models) * len(args.precisions) * len(cases))
    for name, config in args.models:
        for precision in args.precisions:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != 'fp32'
            bench = Bench(cli.load_model(config, None, args.device), precision, args)
            parameters = sum(p.numel() for p in bench.model.parameters())
            for mode, sizes in cases:
                row = dict(
                    model=name, config=config, parameters=parameters, precision=precision, mode=mode, sizes=sizes
                )
                try:
                    row.update(bench.measure(mode, sizes))
                except torch.cuda.OutOfMemoryError:
                    row.update(error='out of memory')
                except (RuntimeError, AssertionError, ValueError) as error:  # a model that does not take the size
                    row.update(error=f'{type(error).__name__}: {str(error).splitlines()[0]}')
                rows.append(row)
                bar.update()
            del bench
    print()
    return rows


def machine(args: argparse.Namespace) -> dict:
    """Where and how it was measured."""
    on_gpu = torch.device(args.device).type == 'cuda'
    return dict(
        device=torch.cuda.get_device_name(args.device) if on_gpu else f'cpu, {torch.get_num_threads()} threads',
        torch=torch.__version__,
        mmengine=mmengine.__version__,
        mmvmamba=mmvmamba.__version__,
        batch_size=args.batch_size,
        warmup=args.warmup,
        steps=args.steps,
        compile=args.compile,
        channels_last=args.channels_last,
    )


def table(rows: list) -> str:
    """The rows as Markdown."""
    lines = ['| model | precision | mode | size | images/s | peak GiB |', '|---|---|---|---|---|---|']
    for row in rows:
        memory = row.get('peak_gib')
        figure = row.get('error') or f'{row["images_per_second"]:.1f}'
        cells = (row['model'], row['precision'], row['mode'], ', '.join(map(str, row['sizes'])), figure)
        lines.append(f'| {" | ".join(cells)} | {"" if memory is None else f"{memory:.2f}"} |')
    return '\n'.join(lines)


def draw(rows: list, path: Path) -> None:
    """Bars of images a second: a panel a mode, a group a precision and size, a color a model."""
    plt = cli.pyplot()
    modes = list(dict.fromkeys(row['mode'] for row in rows))
    names = list(dict.fromkeys(row['model'] for row in rows))
    figure, axes = plt.subplots(1, len(modes), figsize=(4.2 * len(modes), 3.8), layout='constrained', squeeze=False)
    for axis, mode in zip(axes.flat, modes):
        groups = list(
            dict.fromkeys((row['precision'], ', '.join(map(str, row['sizes']))) for row in rows if row['mode'] == mode)
        )
        for i, name in enumerate(names):
            for row in rows:
                if row['model'] == name and row['mode'] == mode and 'error' not in row:
                    place = (
                        groups.index((row['precision'], ', '.join(map(str, row['sizes']))))
                        + (i + 0.5) / len(names) * 0.8
                    )
                    axis.bar(place, row['images_per_second'], 0.75 / len(names), color=f'C{i}')
        axis.set_xticks([i + 0.4 for i in range(len(groups))], [f'{precision}\n{sizes}' for precision, sizes in groups])
        axis.set(title=mode, ylabel='images/s')
        axis.grid(axis='y', alpha=0.3)
    handles = [plt.Rectangle((0, 0), 1, 1, color=f'C{i}') for i in range(len(names))]
    figure.legend(handles, names, loc='outside lower center', ncols=len(names))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def check(args: argparse.Namespace) -> None:
    """Check the arguments before any work."""
    cli.check_out_dir(args.out_dir, args.force)
    device = cli.check_device(args.device)
    cli.check_names(args.models)
    for option, value, low in (
        ('--batch-size', args.batch_size, 1),
        ('--warmup', args.warmup, 0),
        ('--steps', args.steps, 1),
        ('--sizes', min(args.sizes), 32),
        ('--mixed-sizes', min(args.mixed_sizes), 32),
    ):
        if value < low:
            raise cli.UserError(f'{option} is {value}, expected at least {low}')
    for option, sizes in (('--sizes', args.sizes), ('--mixed-sizes', args.mixed_sizes)):
        if max(sizes) > cli.MAX_SIDE:
            raise cli.UserError(f'{option} is {max(sizes)}, expected at most {cli.MAX_SIDE}')
    if 'tf32' in args.precisions and device.type != 'cuda':
        raise cli.UserError(f'--precisions has tf32, which the device {args.device!r} does not have; expected a GPU')


def run(args: argparse.Namespace) -> None:
    """Measure, draw and write; fail at the end if a model had no figure."""
    check(args)
    for _, config in args.models:
        cli.read_config(config)
    rows = measure(args)
    out_dir = cli.make_out_dir(args.out_dir)
    info = machine(args)
    (out_dir / 'throughput.json').write_text(json.dumps(dict(machine=info, rows=rows), indent=2) + '\n')
    where = ', '.join(f'{key} {value}' for key, value in info.items())
    (out_dir / 'throughput.md').write_text(f'{where}\n\n{table(rows)}\n')
    draw(rows, out_dir / 'throughput.png')
    print(f'{where}\n{table(rows)}\nwrote {out_dir}/throughput.json, .md and .png')
    failed = [row for row in rows if 'error' in row]
    if failed:
        raise cli.UserError(f'{len(failed)} of {len(rows)} have no figure; the first: {failed[0]["error"]}')


def main(arguments=None) -> int:
    """Run the tool; returns the exit code."""
    return cli.run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

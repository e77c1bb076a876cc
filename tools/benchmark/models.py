"""Speed and memory of VMamba beside Swin, ConvNeXt and others, in one process.

    python tools/benchmark/models.py --baseline torchvision:swin_t --out benchmarks/results/models.json

Every row is a model in a setting: images a second (median of the repeats, and their spread), peak memory, how much of a
call's time the host takes to launch it (near 100 % the host is the limit, not the GPU), and the ratio to the baseline
in the same setting.  A claim about speed is such a ratio, never a number from another machine or run.
Models are named by their source: an arch of VSSMBackbone (``tiny-s1l8``), the same composed of the unfused ops
(``unfused:tiny-s1l8``), or ``mmpretrain:``, ``timm:`` or ``torchvision:`` and a name there.  With ``--without`` each
arch of VSSMBackbone is measured again for every kind of layer named, with that kind by torch's own layers
(``tiny-s1l8 without norm``): what the fused one gains.
"""

import argparse
import contextlib
import gc
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import report
import torch
import torch.nn.functional as F
from torch import nn

from mmvmamba import VSSMBackbone
from mmvmamba.models import ARCHS
from mmvmamba.ops import use_backend
from mmvmamba.ops.ss2d.interface import use_composed

DEFAULT_MODELS = (
    'tiny-s1l8',
    'unfused:tiny-s1l8',
    'mmpretrain:swin-tiny_16xb64_in1k',
    'mmpretrain:convnext-tiny_32xb128_in1k',
    'torchvision:swin_t',
    'timm:swin_tiny_patch4_window7_224',
    'timm:convnext_tiny',
)
# batch, height, width, and whether the model classifies or is a backbone of four maps
SETTINGS = {
    '224': (128, 224, 224, 'classify'),
    '384': (64, 384, 384, 'classify'),
    'detect': (2, 800, 1344, 'maps'),
    'segment': (4, 512, 512, 'maps'),
    '1024': (1, 1024, 1024, 'maps'),
}
# kinds of fused layers, and their ops
LAYERS = dict(
    norm=('layer_norm', 'add_layer_norm'),
    linear=('linear',),
    mlp=('mlp',),
    depthwise=('depthwise_conv_silu',),
    conv=('conv2d_channel_last',),
)
PRECISIONS = ('fp32', 'tf32', 'fp16', 'bf16')


@dataclass
class Row:
    """One measurement.

    Attributes:
        model (str): The model's name, with its source.
        setting (str): A key of :data:`SETTINGS`.
        precision (str): fp32, tf32, or fp16 or bf16 autocast.
        mode (str): ``infer`` or ``train`` (forward, loss, backward).
        execution (str): ``eager``, ``compile`` or ``graphs`` (compiled, replayed as CUDA graphs).
        images_per_second (float): Median over the repeats.
        spread (float): Distance between the quartiles of the repeats over the median.
        peak_gib (float): Peak memory that tensors took, 0 on CPU.
        host (float | None): Time to launch a call on an idle GPU over the time of a call; None on CPU.
        ratio (float | None): Images a second over the baseline's.
    """

    model: str
    setting: str
    precision: str
    mode: str
    execution: str
    images_per_second: float
    spread: float
    peak_gib: float
    host: float = None
    ratio: float = None


class Classifier(nn.Module):
    """A backbone with the published head: mean over the pixels and a linear layer."""

    def __init__(self, arch: str):
        super().__init__()
        self.backbone = VSSMBackbone(arch, out_indices=(3,))
        self.head = nn.Linear(self.backbone.num_features[-1], 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x)[-1].mean(dim=(2, 3)))


def build_model(name: str, task: str, size: tuple) -> nn.Module:
    """Build a model with random weights.

    Args:
        name (str): See the head of this file.
        task (str): ``classify`` or ``maps``.
        size (tuple[int]): Height and width of the images, for models that must know.
    """
    source, _, model = name.partition(' without ')[0].rpartition(':')
    if source in ('', 'unfused'):
        if model not in ARCHS:
            raise ValueError(f'model is {name!r}, expected an arch of {", ".join(ARCHS)} or source:name')
        return Classifier(model) if task == 'classify' else VSSMBackbone(model)
    if source == 'torchvision':
        import torchvision

        built = torchvision.models.get_model(model, weights=None)
        return built if task == 'classify' else built.features
    if source == 'timm':
        import timm

        options = dict(img_size=size) if 'swin' in model else {}
        return timm.create_model(model, features_only=task == 'maps', **options)
    if source == 'mmpretrain':
        import mmpretrain

        if task == 'classify':
            return mmpretrain.get_model(model)
        return mmpretrain.get_model(model, backbone=dict(out_indices=(0, 1, 2, 3))).backbone
    raise ValueError(f'model is {name!r}, expected the source mmpretrain, timm or torchvision')


def loss_of(outputs) -> torch.Tensor:
    """A loss that needs every output: cross-entropy of logits, mean squares of maps."""
    if isinstance(outputs, torch.Tensor) and outputs.dim() == 2:
        return F.cross_entropy(outputs, torch.zeros(len(outputs), dtype=torch.long, device=outputs.device))
    return sum(out.float().square().mean() for out in _as_list(outputs))


def _as_list(outputs) -> list:
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


class Timer:
    """Times repeats of a function, each ``calls`` long so that the host can run ahead as it does in training.

    On CPU by ``clock``, on a GPU by CUDA events.
    """

    def __init__(self, device: str, repeats: int, calls: int, clock=time.perf_counter):
        self.device, self.repeats, self.calls, self.clock = device, repeats, calls, clock

    def __call__(self, function) -> list:
        """Seconds of one call, for each repeat."""
        for _ in range(3):
            function()
        return [self._repeat(function) for _ in range(self.repeats)]

    def launching(self, function) -> float:
        """Seconds that the host takes to launch one call on an idle GPU, the median over the repeats."""
        seconds = []
        for _ in range(self.repeats):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)

    def _repeat(self, function) -> float:
        if self.device == 'cpu':
            begin = self.clock()
            for _ in range(self.calls):
                function()
            return (self.clock() - begin) / self.calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self.calls):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.calls


@contextlib.contextmanager
def plain_parts(name: str):
    """Run without the fused parts that a model's name excludes."""
    layer = name.partition(' without ')[2]
    with contextlib.ExitStack() as stack:
        if name.startswith('unfused:'):
            stack.enter_context(use_composed())
        if layer:
            stack.enter_context(use_backend('naive', ops=LAYERS[layer]))
        yield


def measure(name, setting, precision, mode, execution, args) -> Row:
    """Build, check and time one model in one setting."""
    batch, height, width, task = SETTINGS[setting]
    batch = args.batch or batch
    device = args.device
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == 'tf32'
    model = build_model(name, task, (height, width)).to(device).train(mode == 'train')
    images = torch.randn(batch, 3, height, width, device=device)
    if name.split(':')[-1].startswith('convnext'):  # its own recommendation
        model, images = (value.to(memory_format=torch.channels_last) for value in (model, images))
    run = model
    if execution != 'eager':
        run = torch.compile(model, mode='reduce-overhead' if execution == 'graphs' else None)
    dtype = dict(fp16=torch.float16, bf16=torch.bfloat16).get(precision)
    scale = 1024.0 if precision == 'fp16' else 1.0
    parameters = list(model.parameters())

    def infer():
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype is not None):
            return run(images)

    def train():
        with torch.autocast(device, dtype, enabled=dtype is not None):
            loss = loss_of(run(images))
        (loss * scale).backward()
        for parameter in parameters:  # what an optimizer does; a module would look for its parameters at every step
            parameter.grad = None
        return loss

    step = infer if mode == 'infer' else train
    with plain_parts(name):
        for out in _as_list(step()):
            if not out.isfinite().all():
                raise FloatingPointError(f'{name} gave values that are not finite')
        peak = 0.0
        if device != 'cpu':
            step()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        clock = time.process_time if args.clock == 'processor' else time.perf_counter
        timer = Timer(device, args.repeats, args.calls, clock)
        seconds = timer(step)
        median, host = statistics.median(seconds), None
        if device != 'cpu':
            peak = torch.cuda.max_memory_allocated() / 2**30
            host = timer.launching(step) / median
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median,) * 3
    return Row(name, setting, precision, mode, execution, batch / median, (high - low) / median, peak, host)


def add_ratios(rows: list, baseline: str) -> None:
    """Set each row's ratio to the baseline's row of the same setting, precision, mode and execution."""

    def key(row):
        return row.setting, row.precision, row.mode, row.execution

    speeds = {key(row): row.images_per_second for row in rows if row.model == baseline}
    for row in rows:
        if key(row) in speeds:
            row.ratio = row.images_per_second / speeds[key(row)]


def format_table(rows: list) -> str:
    """A Markdown table of the rows."""
    lines = [
        '| model | setting | precision | mode | execution | images/s | spread | peak GiB | host | ratio |',
        '|---|---|---|---|---|---|---|---|---|---|',
    ]
    for row in rows:
        digits = 0 if row.images_per_second >= 100 else 2
        ratio = '' if row.ratio is None else f'{row.ratio:.2f}'
        host = '' if row.host is None else f'{row.host:.0%}'
        lines.append(
            f'| {row.model} | {row.setting} | {row.precision} | {row.mode} | {row.execution} '
            f'| {row.images_per_second:.{digits}f} | {row.spread:.1%} | {row.peak_gib:.2f} | {host} | {ratio} |'
        )
    return '\n'.join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=list(DEFAULT_MODELS))
    parser.add_argument(
        '--without',
        nargs='+',
        choices=list(LAYERS),
        default=[],
        help="kinds of layers to replace by torch's own, one at a time",
    )
    parser.add_argument('--baseline', default='mmpretrain:swin-tiny_16xb64_in1k', help='the model of the ratios')
    parser.add_argument('--settings', nargs='+', choices=list(SETTINGS), default=['224'])
    parser.add_argument('--precisions', nargs='+', choices=PRECISIONS, default=['fp16'])
    parser.add_argument('--modes', nargs='+', choices=('infer', 'train'), default=['infer', 'train'])
    parser.add_argument('--executions', nargs='+', choices=('eager', 'compile', 'graphs'), default=['eager', 'compile'])
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--clock',
        choices=('wall', 'processor'),
        default='wall',
        help='clock on CPU: wall time, or processor time of all threads',
    )
    parser.add_argument('--batch', type=int, default=None, help="instead of the setting's own batch")
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--calls', type=int, default=3, help='calls in a repeat')
    parser.add_argument('--out', type=Path, metavar='FILE', help='write the rows to this JSON file')
    parser.add_argument('--add', action='store_true', help='keep the rows that FILE has, if it is of the same build')
    return parser.parse_args(argv)


def main(argv=None) -> list:
    args = parse_args(argv)
    torch.backends.cudnn.benchmark = True
    rows = []
    names = [
        name + suffix
        for name in args.models
        for suffix in ('', *(f' without {layer}' for layer in args.without if name.rpartition(':')[2] in ARCHS))
    ]
    for setting in args.settings:
        for precision in args.precisions:
            for mode in args.modes:
                for execution in args.executions:
                    for name in names:
                        torch._dynamo.reset()
                        try:
                            row = measure(name, setting, precision, mode, execution, args)
                        except (ImportError, FloatingPointError, RuntimeError, TypeError) as error:
                            print(f'{name}, {setting}, {precision}, {mode}, {execution}: {error!r:.200}', flush=True)
                            continue
                        finally:
                            gc.collect()
                            if args.device == 'cuda':
                                torch.cuda.empty_cache()
                        rows.append(row)
                        print(format_table([row]).splitlines()[-1], flush=True)
    add_ratios(rows, args.baseline)
    print(f'\n{report.machine_name(args.device)}, torch {torch.__version__}\n\n{format_table(rows)}')
    if args.out is not None:
        report.write(args.out, args.device, [asdict(row) for row in rows], args.add)
    return rows


if __name__ == '__main__':
    main()

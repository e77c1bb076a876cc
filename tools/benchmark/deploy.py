"""Every way to run a model that mmvmamba.export offers, beside torch and beside other models in the same engine.

    python tools/benchmark/deploy.py --out benchmarks/results/deploy.json

Every row is a model in a form, at a batch and a size: processor time and wall time of an image (medians of interleaved
repeats, one of each form in turn), size of the file, time to load it, largest error against the model in torch, and the
ratio to the first model in torch eager at the same batch and size.  Processor time is that of all threads: on a busy
machine it says more than wall time.  On a GPU both are the time of the GPU.

Forms: eager, compile, compile-freezing; aoti (a package of AOTInductor), aoti-freezing, and both with -static (sizes
fixed); onnx (the default of to_onnx), onnx-SCAN for each form of the scan, each also with -int8 (dynamic MatMuls), all
in onnxruntime; openvino and openvino-SCAN (the files of onnx and onnx-SCAN in OpenVINO, where it is installed), each
also with -static.  On a GPU also graphs and aoti-graphs, replayed as CUDA graphs.
A form that cannot run says why and the others go on.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Optional

import report
import torch
from timing import graphed
from torch import nn

from mmvmamba.export import Package, to_onnx, to_package
from mmvmamba.export.graphs import Autocast, as_tuple, relative_error
from mmvmamba.export.package import PRECISIONS

MODELS = ('vmamba_tiny_s1l8', 'swin_tiny_patch4_window7_224', 'convnext_tiny')
FORMS = dict(
    cpu=(
        *('eager', 'compile', 'compile-freezing', 'aoti', 'aoti-freezing', 'aoti-freezing-static'),
        *('onnx', 'onnx-int8', 'onnx-loop-free', 'onnx-custom-op', 'onnx-custom-op-int8'),
        *('openvino', 'openvino-loop-free', 'openvino-custom-op'),
        *('openvino-static', 'openvino-loop-free-static', 'openvino-custom-op-static'),
    ),
    cuda=('eager', 'compile', 'graphs', 'aoti', 'aoti-graphs', 'aoti-static', 'aoti-static-graphs'),
)
FORMS_OF_ANY = ('onnx-int8', 'openvino-static')  # of runtimes of ONNX, of a model without a scan


@dataclass
class Row:
    """One measurement.

    Attributes:
        model (str): Its name in timm.
        form (str): See the head of this file.
        batch (int): Images a call.
        size (int): Height and width.
        precision (str): float32, or float16 or bfloat16 under autocast.
        cpu_ms (float): Processor time of an image in milliseconds; on a GPU the time of the GPU.
        wall_ms (float): Time of an image in milliseconds.
        spread (float): Distance between the quartiles of ``cpu_ms`` over its median.
        error (float | None): Largest difference from the model in torch in float32, relative to the largest output; not
            for CUDA graphs.
        file_mib (float | None): Size of the file; None where there is none.
        load_s (float | None): Seconds from the file to a function; with ``compile`` those of the first call.
        ratio (float | None): ``cpu_ms`` over that of the first model in torch eager.
    """

    model: str
    form: str
    batch: int
    size: int
    precision: str
    cpu_ms: float
    wall_ms: float
    spread: float
    error: Optional[float] = None
    file_mib: Optional[float] = None
    load_s: Optional[float] = None
    ratio: Optional[float] = None


@dataclass
class Form:
    """A function of the images, and what its file was."""

    call: Callable
    file_mib: Optional[float] = None
    load_s: Optional[float] = None


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=list(MODELS), help="timm's names (default: %(default)s)")
    parser.add_argument('--forms', nargs='+', help='default: all that the device has')
    parser.add_argument('--batch-sizes', type=int, nargs='+', default=[1, 8], help='default: %(default)s')
    parser.add_argument('--sizes', type=int, nargs='+', default=[224, 512], help='default: %(default)s')
    parser.add_argument('--precision', choices=list(PRECISIONS), default='float32', help='default: %(default)s')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--threads', type=int, default=1, help='threads on the CPU (default: %(default)s)')
    parser.add_argument('--repeats', type=int, default=9, help='default: %(default)s')
    parser.add_argument('--files', type=Path, help='folder to keep the files in, and to take them from')
    parser.add_argument(
        '--add', action='store_true', help='keep the rows that --out has, of the same machine and commit'
    )
    parser.add_argument('--out', type=Path, help='a JSON file')
    return parser.parse_args(arguments)


def build_model(name: str, size: int, device: str) -> nn.Module:
    """A classifier of timm with random weights, the same at every call."""
    import timm

    import mmvmamba.integrations.timm  # noqa: F401  (registers VMamba)

    torch.manual_seed(0)
    options = dict(img_size=size) if 'swin' in name else {}
    return timm.create_model(name, **options).eval().requires_grad_(False).to(device)


class Maker:
    """Makes the forms of one model at one size; files are made once for all batches that they take.

    Args:
        name (str): The model.
        size (int): Height and width of the images.
        args (Namespace): The command line.
        folder (Path): Where files go.
    """

    def __init__(self, name: str, size: int, args: argparse.Namespace, folder: Path):
        self.name, self.size, self.args, self.folder = name, size, args, folder
        self.model = build_model(name, size, args.device)
        dtype = PRECISIONS[args.precision]
        self.module = self.model if dtype is None else Autocast(self.model, args.device, dtype).eval()
        self.any_size = 'vmamba' in name  # timm's Swin is built for one size

    def has(self, form: str) -> bool:
        """Whether the form is one of this model: only VMamba has a scan."""
        return self.any_size or not form.startswith(('onnx-', 'openvino-')) or form in FORMS_OF_ANY

    def make(self, form: str, x: torch.Tensor) -> Form:
        """The function of a form for images like ``x``."""
        kind, *options = form.split('-')
        if form == 'eager':
            return Form(lambda: self.module(x))
        if form in ('compile', 'compile-freezing', 'graphs'):
            compiled = torch.compile(self.module, options=dict(freezing=True) if 'freezing' in options else None)
            start = time.perf_counter()
            compiled(x)
            seconds = time.perf_counter() - start
            return Form(graphed(lambda: compiled(x)) if form == 'graphs' else lambda: compiled(x), None, seconds)
        if kind == 'aoti':
            return self._package(options, x)
        if kind == 'onnx':
            return self._onnxruntime(form, x)
        if kind == 'openvino':
            return self._openvino(form, x)
        raise ValueError(f'form is {form!r}, expected one of those in --help')

    def _package(self, options: list, x: torch.Tensor) -> Form:
        static, frozen = 'static' in options, 'freezing' in options
        tag = f'-{len(x)}x{self.size}' if static or not self.any_size else ''
        path = self.folder / f'{self.name}-aoti{"-freezing" * frozen}{tag}.pt2'
        if not path.exists():
            dynamic = not static and self.any_size
            example = torch.randn(2, 3, 96, 64, device=x.device) if dynamic else x
            to_package(self.model, example, path, dynamic=dynamic, freezing=frozen, precision=self.args.precision)
        graphs = 'graphs' in options
        package, seconds = clocked(lambda: Package(path, run_single_threaded=graphs))
        return Form(graphed(lambda: package(x)) if graphs else lambda: package(x), mib(path), seconds)

    def _onnx_file(self, form: str, x: torch.Tensor) -> Path:
        scan = form.removeprefix('onnx').removeprefix('-')
        path = self.folder / (f'{self.name}-{form}.onnx' if self.any_size else f'{self.name}-onnx-{self.size}.onnx')
        if path.exists():
            return path
        if self.any_size:
            to_onnx(self.model, torch.randn(2, 3, 64, 96), path, **(dict(scan=scan) if scan else {}))
        else:
            names = dict(input_names=['images'], dynamic_axes=dict(images={0: 'batch'}), opset_version=17)
            torch.onnx.export(self.model, (x[:1],), str(path), dynamo=False, **names)
        return path

    def _onnxruntime(self, form: str, x: torch.Tensor) -> Form:
        import onnxruntime

        path = self._onnx_file(form.removesuffix('-int8'), x)
        if form.endswith('-int8'):
            from onnxruntime.quantization import QuantType, quantize_dynamic

            whole, path = path, path.with_name(f'{path.stem}-int8.onnx')
            if not path.exists():
                quantize_dynamic(whole, path, op_types_to_quantize=['MatMul'], weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.args.threads
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        if 'custom-op' in form and self.any_size:
            from mmvmamba.export import onnxruntime_library

            options.register_custom_ops_library(str(onnxruntime_library()))
        providers = ['CPUExecutionProvider']
        session, seconds = clocked(lambda: onnxruntime.InferenceSession(str(path), options, providers=providers))
        feed = dict(images=x.numpy())
        return Form(lambda: torch.from_numpy(session.run(None, feed)[0]), mib(path), seconds)

    def _openvino(self, form: str, x: torch.Tensor) -> Form:
        from mmvmamba.export.openvino.file import shared_core

        path = self._onnx_file(form.removesuffix('-static').replace('openvino', 'onnx'), x)
        core = shared_core()
        if 'custom-op' in form:
            from mmvmamba.export import openvino_library

            core.add_extension(str(openvino_library()))
        options = dict(INFERENCE_NUM_THREADS=self.args.threads, INFERENCE_PRECISION_HINT='f32')

        def load():
            model = core.read_model(path)
            if form.endswith('-static'):
                model.reshape(list(x.shape))
            return core.compile_model(model, 'CPU', options)

        model, seconds = clocked(load)
        return Form(lambda: torch.from_numpy(model([x.numpy()])[0]), mib(path), seconds)


def clocked(function: Callable) -> tuple:
    """What a function gives, and the seconds that it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def mib(path: Path) -> float:
    """Size of a file."""
    return path.stat().st_size / 2**20


def time_interleaved(forms: dict, device: str, repeats: int) -> dict:
    """Processor and wall times in milliseconds of each function, one call of each in turn."""
    times: dict = {key: ([], []) for key in forms}
    for repeat in range(repeats + 1):
        for key, form in forms.items():
            if device == 'cuda':
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(10):
                    form.call()
                end.record()
                end.synchronize()
                spent = (start.elapsed_time(end) / 10,) * 2
            else:
                wall, cpu = time.perf_counter(), time.process_time()
                form.call()
                spent = ((time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3)
            if repeat:  # the first one warms up
                for values, value in zip(times[key], spent):
                    values.append(value)
    return times


def measure(args: argparse.Namespace, batch: int, size: int, folder: Path) -> list:
    """The rows of all models and forms at a batch and a size."""
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(args.device)
    forms, errors = {}, {}
    torch._dynamo.reset()  # or the next batch would be compiled for any
    for name in args.models:
        maker = Maker(name, size, args, folder)
        expected = as_tuple(maker.model(x))
        for form in filter(maker.has, args.forms):
            try:
                made = maker.make(form, x)
                result = made.call()  # of a replayed graph nothing is seen
                if result is not None:
                    errors[name, form] = relative_error(as_tuple(result), expected)
            except Exception as error:  # each engine raises its own; the others go on
                print(
                    f'{name} {form}: left out, {type(error).__name__}: {str(error).splitlines()[0][:200]}', flush=True
                )
                continue
            forms[name, form] = made
        gc.collect()
    times = time_interleaved(forms, args.device, args.repeats)
    base = times.get((args.models[0], 'eager'))
    rows = []
    for (name, form), (cpu, wall) in times.items():
        middle, quartiles = statistics.median(cpu), statistics.quantiles(cpu, n=4) if len(cpu) > 1 else (cpu[0],) * 3
        row = Row(
            name,
            form,
            batch,
            size,
            args.precision,
            cpu_ms=round(middle / batch, 3),
            wall_ms=round(statistics.median(wall) / batch, 3),
            spread=round((quartiles[2] - quartiles[0]) / middle, 3),
            error=errors.get((name, form)),
            file_mib=forms[name, form].file_mib,
            load_s=forms[name, form].load_s,
            ratio=round(middle / statistics.median(base[0]), 3) if base else None,
        )
        rows.append(asdict(row))
        print(
            f'{name:30} {form:22} {batch} x {size}: {row.cpu_ms:8.2f} ms ({row.wall_ms:.2f} wall), '
            f'ratio {row.ratio}, error {row.error}',
            flush=True,
        )
    return rows


def main(arguments=None) -> int:
    """Measure, print and write."""
    args = parse_args(arguments)
    if not args.forms:
        has_openvino = find_spec('openvino') is not None
        args.forms = [form for form in FORMS[args.device] if has_openvino or not form.startswith('openvino')]
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder = args.files or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for size in args.sizes:
            for batch in args.batch_sizes:
                rows += measure(args, batch, size, folder)
    if args.out:
        report.write(args.out, args.device, rows, add=args.add)
    return 0


if __name__ == '__main__':
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
    sys.exit(main())

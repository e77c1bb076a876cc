"""Export a model as an ONNX file, with dynamic batch, height and width.

python tools/export/to_onnx.py CONFIG CHECKPOINT --out model.onnx

Classifiers and segmentors are exported whole (scores before the softmax; a segmentor's at the size of the image), of a
detector backbone and neck.  The input is named images: float32 (batch, 3, height, width), normalised with the mean, std
and channel order that the file keeps in its metadata.  --scan says how the selective scan is written: in standard
operators along the rows and columns of the map (rows) or without a loop (loop-free), or as one operator of this
package's libraries for onnxruntime and OpenVINO (custom-op).  --float16 and --quantize make smaller files.
onnx.checker checks the file, and onnxruntime must give PyTorch's outputs at sizes other than the one that was traced,
or it is not kept.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from mmvmamba import cli
from mmvmamba.export import onnxruntime_library, to_onnx
from mmvmamba.export.graphs import as_graph, as_tuple, relative_error
from mmvmamba.export.onnx_scan import OPSET, SCANS, check_scan
from mmvmamba.export.origin import describe
from mmvmamba.export.precision import check_precision

TOLERANCES = dict(float32=1e-4, float16=2e-2, int8=0.1)
MULTIPLE = 32  # the last stage's stride


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='path of the config, or SCOPE::NAME')
    parser.add_argument('checkpoint', help="path or URL of the checkpoint, or 'none' for initial weights")
    parser.add_argument('--out', type=Path, default=Path('model.onnx'), help='the file (default: %(default)s)')
    parser.add_argument('--part', choices=['auto', 'backbone'], default='auto', help='default: as said above')
    parser.add_argument('--size', type=int, nargs='+', default=[64, 96], help='H [W] to trace (default: 64 96)')
    parser.add_argument(
        '--check-sizes', nargs='+', default=['96x64', '104x136', '224x224'], metavar='HxW', help='default: %(default)s'
    )
    parser.add_argument(
        '--scan', choices=['auto', *SCANS], default='auto', help='form of the selective scan (default: auto, rows)'
    )
    parser.add_argument('--float16', action='store_true', help='all but the scan, the input and the outputs in float16')
    parser.add_argument(
        '--quantize',
        choices=['dynamic', 'static'],
        help='int8 linear layers, scaled at each run or by the images of --calibration',
    )
    parser.add_argument('--calibration', metavar='FOLDER', help='images for --quantize static')
    parser.add_argument('--calibration-images', type=int, default=64, help='how many at most (default: %(default)s)')
    parser.add_argument(
        '--calibration-size', type=int, nargs='+', default=[224, 224], help='H [W] they get (default: 224 224)'
    )
    parser.add_argument('--no-check', action='store_true', help='do not compare with PyTorch, which needs onnxruntime')
    parser.add_argument('--force', action='store_true', help='replace --out if it exists')
    return parser.parse_args(arguments)


def check_arguments(args: argparse.Namespace) -> tuple:
    """Check the arguments before any work; returns the size to trace and those to compare at."""
    missing = [name for name in ('onnx', *([] if args.no_check else ['onnxruntime'])) if find_spec(name) is None]
    if missing:
        raise cli.UserError(
            f'{" and ".join(missing)} cannot be imported; install with: pip install {" ".join(missing)}'
        )
    if args.out.is_dir():
        raise cli.UserError(f'--out is {str(args.out)!r}, a folder; expected the path of a file')
    if args.out.exists() and not args.force:
        raise cli.UserError(f'--out {str(args.out)!r} exists; expected a new file, or --force')
    cli.check_writable(args.out.parent, '--out')
    size = cli.parse_size(args.size)
    if any(side % MULTIPLE for side in size):
        raise cli.UserError(f'--size is {size[0]} {size[1]}, expected multiples of {MULTIPLE}')
    sizes = []
    for text in args.check_sizes:
        sides = text.split('x')
        if len(sides) != 2 or not all(side.isdigit() for side in sides):
            raise cli.UserError(f'--check-sizes has {text!r}, expected HxW, such as 224x224')
        sizes.append(cli.parse_size([int(side) for side in sides], '--check-sizes'))
    check_lower_precision(args)
    return size, sizes


def check_lower_precision(args: argparse.Namespace) -> None:
    """Check the options that decide how the file computes."""
    try:
        check_precision(check_scan(args.scan), args.float16, args.quantize, args.calibration)
        if args.scan == 'custom-op' and not args.no_check:
            onnxruntime_library()
    except (ValueError, FileNotFoundError) as error:
        raise cli.UserError(str(error)) from error
    if (args.float16 or args.quantize) and find_spec('onnxruntime') is None:
        raise cli.UserError('--float16 and --quantize need onnxruntime; install with: pip install onnxruntime')
    if args.calibration_images < 1:
        raise cli.UserError(f'--calibration-images is {args.calibration_images}, expected at least 1')
    cli.parse_size(args.calibration_size, '--calibration-size')
    if args.calibration is not None:
        cli.list_images(args.calibration, '--calibration', 1)


def calibration_images(args: argparse.Namespace, model: torch.nn.Module, channels: int):
    """The images to calibrate with, normalised as the model's input."""
    size = cli.parse_size(args.calibration_size, '--calibration-size')
    for path in cli.list_images(args.calibration, '--calibration', args.calibration_images):
        yield cli.normalize(model, cli.read_image(path, '--calibration', size, channels))


def compare(path: Path, graph: torch.nn.Module, sizes: list, channels: int, scan: str = 'auto') -> dict:
    """Largest relative error of the file in onnxruntime at each size, with batches of 1 and 2 in turn."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if scan == 'custom-op':
        options.register_custom_ops_library(str(onnxruntime_library()))
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    errors = {}
    for i, size in enumerate(sizes):
        x = torch.randn(1 + i % 2, channels, *size, generator=torch.Generator().manual_seed(i))
        outputs = [torch.from_numpy(out) for out in session.run(None, {'images': x.numpy()})]
        with torch.no_grad():
            errors[size] = relative_error(outputs, as_tuple(graph(x)))
    return errors


def run(args: argparse.Namespace) -> None:
    """Export, compare, and only then put the file in its place."""
    size, check_sizes = check_arguments(args)
    model = cli.load_model(args.config, args.checkpoint)
    scope = cli.read_config(args.config).default_scope
    graph, names = as_graph(model, scope, args.part)
    channels = cli.image_channels(model)
    example = torch.randn(2, channels, *size)
    if not names:
        with torch.no_grad():
            names = tuple(f'map{i}' for i, _ in enumerate(graph(example)))
    mean, std, to_rgb = cli.preprocessing(model)
    order = f'{channels} as they are' if channels != 3 else 'RGB' if to_rgb else 'BGR'
    metadata = dict(mean=str(mean), std=str(std), channels=order, config=Path(args.config).name)
    metadata.update(describe(model, scope, args.part))

    cli.make_out_dir(args.out.parent)
    partial = args.out.with_name(args.out.name + '.partial')
    try:
        images = calibration_images(args, model, channels) if args.calibration else None
        try:
            to_onnx(graph, example, partial, names, metadata, args.scan, args.float16, args.quantize, images)
        except ValueError as error:
            raise cli.UserError(f'config {args.config!r}: {error}') from error
        errors = {} if args.no_check else compare(partial, graph, check_sizes, channels, args.scan)
        precision = 'float16' if args.float16 else 'int8' if args.quantize else 'float32'
        for (height, width), error in errors.items():
            print(f'{height}x{width}: largest relative error {error:.1e}')
        tolerance = TOLERANCES[precision]
        if any(not error < tolerance for error in errors.values()):
            raise cli.UserError(f'the outputs differ from PyTorch by more than {tolerance}; {args.out} is not written')
        partial.replace(args.out)
    finally:
        partial.unlink(missing_ok=True)
    print(f'wrote {args.out}: opset {OPSET}, input images, outputs {", ".join(names)}, dynamic batch, height and width')
    print(f'the scan is {check_scan(args.scan)}, the layers are {precision}')


def main(arguments=None) -> int:
    """Run the tool; returns the exit code."""
    return cli.run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

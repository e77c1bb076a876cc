"""Export a model as an ONNX file of standard operators, with dynamic batch, height and width.

python tools/export/to_onnx.py CONFIG CHECKPOINT --out model.onnx

Classifiers and segmentors are exported whole (scores before the softmax; a segmentor's at the size of the image), of a
detector backbone and neck.  The input is named images: float32 (batch, 3, height, width), normalised with the mean, std
and channel order that the file keeps in its metadata.  onnx.checker checks the file, and onnxruntime must give
PyTorch's outputs at sizes other than the one that was traced, or the file is not kept.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from mmvmamba import cli
from mmvmamba.export.graphs import as_graph, as_tuple, relative_error
from mmvmamba.export.onnx_scan import OPSET, export_onnx
from mmvmamba.export.origin import describe

TOLERANCE = 1e-4
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
    return size, sizes


def compare(path: Path, graph: torch.nn.Module, sizes: list, channels: int) -> dict:
    """Largest relative error of the file in onnxruntime at each size, with batches of 1 and 2 in turn."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
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
        try:
            export_onnx(graph, example, names, partial, metadata)
        except ValueError as error:
            raise cli.UserError(f'config {args.config!r}: {error}') from error
        errors = {} if args.no_check else compare(partial, graph, check_sizes, channels)
        for (height, width), error in errors.items():
            print(f'{height}x{width}: largest relative error {error:.1e}')
        if any(not error < TOLERANCE for error in errors.values()):
            raise cli.UserError(f'the outputs differ from PyTorch by more than {TOLERANCE}; {args.out} is not written')
        partial.replace(args.out)
    finally:
        partial.unlink(missing_ok=True)
    print(f'wrote {args.out}: opset {OPSET}, input images, outputs {", ".join(names)}, dynamic batch, height and width')


def main(arguments=None) -> int:
    """Run the tool; returns the exit code."""
    return cli.run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

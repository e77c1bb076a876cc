"""Compile a model to a package of AOTInductor, which runs from Python and from C++, with libtorch and the compiled ops.

python tools/export/to_package.py CONFIG CHECKPOINT --out model.pt2 --freezing

From Python:

    from mmvmamba.export import Package
    scores = Package('model.pt2')(images)

docs/cpp/ has a program in C++.  What is exported, and how images are normalised, is as in to_onnx.py.  Batch, height
and width are dynamic, or with --static those of --batch-size and --size.  The package has code for the processor or GPU
of this machine.  It is loaded and must give the model's outputs, also at sizes that were not traced, or it is not kept.
"""

import argparse
import sys
from pathlib import Path

import torch

from mmvmamba import cli
from mmvmamba.export import Package, op_library, to_package
from mmvmamba.export.graphs import as_graph, as_tuple, relative_error
from mmvmamba.export.origin import describe
from mmvmamba.export.package import PRECISIONS, check_can_package

TOLERANCES = dict(float32=1e-4, float16=2e-2, bfloat16=1e-1)  # of what rounding to 11 and 8 bits gives
CHECK_SIZES = ((96, 64), (104, 136), (224, 224))


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='path of the config, or SCOPE::NAME')
    parser.add_argument('checkpoint', help="path or URL of the checkpoint, or 'none' for initial weights")
    parser.add_argument('--out', type=Path, default=Path('model.pt2'), help='the file (default: %(default)s)')
    parser.add_argument('--part', choices=['auto', 'backbone'], default='auto', help='default: as in to_onnx.py')
    parser.add_argument('--device', default='cpu', help='what the package is for: cpu or cuda (default: %(default)s)')
    parser.add_argument('--precision', choices=list(PRECISIONS), default='float32', help='default: %(default)s')
    parser.add_argument('--freezing', action='store_true', help='turn weights into constants: faster on a CPU')
    parser.add_argument('--static', action='store_true', help='for one size and batch size only, where it is faster')
    parser.add_argument('--size', type=int, nargs='+', default=[224], help='H [W] of --static (default: 224)')
    parser.add_argument('--batch-size', type=int, default=1, help='of --static (default: %(default)s)')
    parser.add_argument('--force', action='store_true', help='replace --out if it exists')
    return parser.parse_args(arguments)


def check_arguments(args: argparse.Namespace) -> torch.device:
    """Check the arguments and the machine before any work; returns the device."""
    if args.out.is_dir():
        raise cli.UserError(f'--out is {str(args.out)!r}, a folder; expected the path of a file')
    if args.out.suffix != '.pt2':
        raise cli.UserError(f'--out is {str(args.out)!r}, expected a name that ends in .pt2')
    if args.out.exists() and not args.force:
        raise cli.UserError(f'--out {str(args.out)!r} exists; expected a new file, or --force')
    cli.check_writable(args.out.parent, '--out')
    args.size = cli.parse_size(args.size)
    if args.batch_size < 1:
        raise cli.UserError(f'--batch-size is {args.batch_size}, expected 1 or more')
    device = cli.check_device(args.device)
    try:
        check_can_package(device)
    except RuntimeError as error:
        raise cli.UserError(str(error)) from error
    return device


def compare(path: Path, graph: torch.nn.Module, shapes: list, device: torch.device) -> dict:
    """Largest relative error of the loaded package for each shape of images."""
    package, errors = Package(path), {}
    for i, shape in enumerate(shapes):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device)
        with torch.no_grad():
            errors[shape] = relative_error(as_tuple(package(x)), as_tuple(graph(x)))
    return errors


def run(args: argparse.Namespace) -> None:
    """Compile, compare, and only then put the file in its place."""
    device = check_arguments(args)
    model = cli.load_model(args.config, args.checkpoint, device)
    channels = cli.image_channels(model)
    scope = cli.read_config(args.config).default_scope
    graph, _ = as_graph(model, scope, args.part)
    mean, std, to_rgb = cli.preprocessing(model)
    order = f'{channels} as they are' if channels != 3 else 'RGB' if to_rgb else 'BGR'
    metadata = dict(mean=str(mean), std=str(std), channels=order, config=Path(args.config).name)
    metadata.update(describe(model, scope, args.part))
    shapes = [(1 + i % 2, channels, *size) for i, size in enumerate(CHECK_SIZES)]
    example = torch.randn(2, channels, 64, 96, device=device)
    if args.static:
        shapes = [(args.batch_size, channels, *args.size)]
        example = torch.randn(shapes[0], device=device)

    cli.make_out_dir(args.out.parent)
    partial = args.out.with_name(args.out.stem + '.unchecked.pt2')
    try:
        try:
            to_package(
                graph,
                example,
                partial,
                dynamic=not args.static,
                freezing=args.freezing,
                precision=args.precision,
                metadata=metadata,
            )
        except ValueError as error:
            raise cli.UserError(f'config {args.config!r}: {error}') from error
        errors, tolerance = compare(partial, graph, shapes, device), TOLERANCES[args.precision]
        for (batch, _, height, width), error in errors.items():
            print(f'{batch} x {height}x{width}: largest relative error {error:.1e}')
        if any(not error < tolerance for error in errors.values()):
            raise cli.UserError(f'the outputs differ by more than {tolerance}; {args.out} is not written')
        report(Package(partial), args.out)
        partial.replace(args.out)
    finally:
        partial.unlink(missing_ok=True)


def report(package: Package, out: Path) -> None:
    """Print what the package takes and needs."""
    sizes = {axis: (least, most) for axis, (least, most) in package.sizes.items() if axis != 'channels'}
    takes = ', '.join(
        f'{axis} {least}' + ('' if least == most else ' or more') for axis, (least, most) in sizes.items()
    )
    needs = f'the ops of {op_library()}'
    if package.python_ops:
        needs = f'Python, for {", ".join(package.python_ops)}'
    print(f'wrote {out}: {takes}; it needs torch {torch.__version__} and {needs}')


def main(arguments=None) -> int:
    """Run the tool; returns the exit code."""
    return cli.run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

"""Export a model as a program of torch.export, with dynamic batch, height and width.

python tools/export/to_program.py CONFIG CHECKPOINT --out model.pt2

Loading it needs torch and mmvmamba's ops, but no config and no OpenMMLab codebase:

    import torch, mmvmamba.ops
    scores = torch.export.load('model.pt2').module()(images)

The scan is one node, served by the op backend of the device it was exported on.  What is exported, and how images are
normalised, is as in to_onnx.py; the file is loaded again and must give the model's outputs at other sizes.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from mmvmamba import cli
from mmvmamba.export.graphs import as_graph, as_tuple, relative_error
from mmvmamba.export.origin import describe
from mmvmamba.export.program import export_program
from mmvmamba.export.runtimes import METADATA
from mmvmamba.ops import backend_report

TOLERANCE = 1e-4
CHECK_SIZES = ((96, 64), (104, 136), (224, 224))


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='path of the config, or SCOPE::NAME')
    parser.add_argument('checkpoint', help="path or URL of the checkpoint, or 'none' for initial weights")
    parser.add_argument('--out', type=Path, default=Path('model.pt2'), help='the file (default: %(default)s)')
    parser.add_argument('--part', choices=['auto', 'backbone'], default='auto', help='default: as in to_onnx.py')
    parser.add_argument('--device', default='cpu', help='device of the program (default: %(default)s)')
    parser.add_argument('--force', action='store_true', help='replace --out if it exists')
    return parser.parse_args(arguments)


def compare(path: Path, graph: torch.nn.Module, device: str, channels: int = 3) -> dict:
    """Largest relative error of the loaded file at each size, with batches of 1 and 2 in turn."""
    program, errors = torch.export.load(path).module(), {}
    for i, size in enumerate(CHECK_SIZES):
        x = torch.randn(1 + i % 2, channels, *size, generator=torch.Generator().manual_seed(i)).to(device)
        with torch.no_grad():
            errors[size] = relative_error(as_tuple(program(x)), as_tuple(graph(x)))
    return errors


def run(args: argparse.Namespace) -> None:
    """Export, compare, and only then put the file in its place."""
    if args.out.is_dir():
        raise cli.UserError(f'--out is {str(args.out)!r}, a folder; expected the path of a file')
    if args.out.exists() and not args.force:
        raise cli.UserError(f'--out {str(args.out)!r} exists; expected a new file, or --force')
    cli.check_writable(args.out.parent, '--out')
    if args.out.suffix != '.pt2':
        raise cli.UserError(f'--out is {str(args.out)!r}, expected a name that ends in .pt2')
    device = cli.check_device(args.device)
    compiled = [s.name for s in backend_report() if s.available and device.type in s.devices]
    if not compiled:
        reasons = '; '.join(f'{s.name}: {s.reason}' for s in backend_report() if device.type in s.devices)
        raise cli.UserError(f'a program needs a compiled op backend on {device.type}, and none can run: {reasons}')
    model = cli.load_model(args.config, args.checkpoint, device)
    channels = cli.image_channels(model)
    scope = cli.read_config(args.config).default_scope
    graph, _ = as_graph(model, scope, args.part)
    metadata = {METADATA: json.dumps(describe(model, scope, args.part))}

    cli.make_out_dir(args.out.parent)
    partial = args.out.with_name(args.out.stem + '.partial.pt2')
    try:
        example = torch.randn(2, channels, 64, 96, device=args.device)
        torch.export.save(export_program(graph, example), partial, extra_files=metadata)
        errors = compare(partial, graph, args.device, channels)
        for (height, width), error in errors.items():
            print(f'{height}x{width}: largest relative error {error:.1e}')
        if any(not error < TOLERANCE for error in errors.values()):
            raise cli.UserError(f'the outputs differ by more than {TOLERANCE}; {args.out} is not written')
        partial.replace(args.out)
    finally:
        partial.unlink(missing_ok=True)
    print(f'wrote {args.out}: batch, height and width (from 33 pixels) are dynamic; load it after import mmvmamba.ops')


def main(arguments=None) -> int:
    """Run the tool; returns the exit code."""
    return cli.run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

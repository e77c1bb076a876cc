"""Evaluate a checkpoint of a classifier, a detector or a segmentor; the config says which.

python tools/test.py CONFIG CHECKPOINT [--tta] [--show-dir pictures]
"""

import argparse
import sys
from pathlib import Path

from mmengine.evaluator import DumpResults

from mmvmamba.checkpoint import find_damage
from mmvmamba.cli import UserError, run_tool
from mmvmamba.cli.launch import (
    add_common_arguments,
    build_runner,
    check_data,
    download,
    load_config,
    set_test_time_augmentation,
    set_visualization,
)
from mmvmamba.training.loading import whole_models


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='path of the config')
    parser.add_argument('checkpoint', help='path or URL of the checkpoint')
    add_common_arguments(parser)
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation (multi-scale and flip, see the config)'
    )
    parser.add_argument('--show-dir', help='draw the predictions into this folder')
    parser.add_argument('--out', help='write all predictions to this .pkl file')
    return parser.parse_args(arguments)


def prepare_config(args: argparse.Namespace):
    """The config with what the command line asks for."""
    checkpoint = download(args.checkpoint)
    if '://' not in checkpoint:
        if not Path(checkpoint).is_file():
            raise UserError(f'checkpoint {checkpoint!r} is not a file; expected a path or a URL')
        with open(checkpoint, 'rb') as file:
            damage = find_damage(file) if file.read(2) == b'PK' else ''
        if damage:
            raise UserError(f'checkpoint {checkpoint!r} is damaged, {damage}')
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out is {args.out!r}, expected a file name that ends in .pkl')
    cfg = load_config(args)
    check_data(cfg, 'test')
    cfg.load_from = checkpoint
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.show_dir:
        set_visualization(cfg, args.show_dir)
    if args.tta:
        set_test_time_augmentation(cfg)
    return cfg


def run(args: argparse.Namespace) -> None:
    """Evaluate what the command line asks for."""
    runner = build_runner(prepare_config(args))
    if args.out:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    with whole_models():
        runner.test()


def main(arguments=None) -> int:
    """Evaluate; returns the exit code."""
    return run_tool(run, parse_args(arguments), quiet=False)


if __name__ == '__main__':
    sys.exit(main())

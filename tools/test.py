"""Evaluate a checkpoint of a classifier, a detector or a segmentor; the config says which.

python tools/test.py CONFIG CHECKPOINT [--tta] [--complexity] [--show-dir pictures]
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from mmengine.dist import is_main_process
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
    parser.add_argument(
        '--complexity',
        action='store_true',
        help='also report parameters, FLOPs and throughput (the batch size is that of test_dataloader)',
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


def load_analysis(name: str):
    """A script of tools/analysis as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parent / f'analysis/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report_complexity(runner, args: argparse.Namespace) -> None:
    """Log what the model costs: by the rules of tools/analysis/get_flops.py and throughput.py."""
    get_flops, throughput = load_analysis('get_flops'), load_analysis('throughput')
    cfg, model = runner.cfg.copy(), getattr(runner.model, 'module', runner.model)  # of DDP, or of the augmentation
    cfg.model = cfg.model.get('module', cfg.model)
    shape, batch = get_flops.default_shape(cfg), cfg.test_dataloader.get('batch_size', 1)
    size, device = f'{shape[0]}x{shape[1]}', next(model.parameters()).device
    analysis = get_flops.count(cfg, shape)
    settings = dict(batch_size=batch, warmup=10, steps=30, channels_last=False, compile=None, device=device)
    precision = 'fp16' if args.amp and device.type == 'cuda' else 'fp32'
    speed = throughput.Bench(model, precision, argparse.Namespace(**settings)).measure('inference', [shape])
    what = f'images/s of {size} on {device}, {precision}, batches of {batch}'
    if cfg.default_scope != 'mmpretrain':
        what += ', backbone and neck'
    runner.logger.info(f'parameters: {get_flops.count_parameters(model):,}')
    runner.logger.info(f'FLOPs: {analysis.total() / 1e9:.2f} G for an image of {size}')
    figure = speed['error'] if 'error' in speed else f'{speed["images_per_second"]:.1f}'
    runner.logger.info(f'throughput: {figure} {what}')


def run(args: argparse.Namespace) -> None:
    """Evaluate what the command line asks for."""
    if args.complexity and importlib.util.find_spec('fvcore') is None:
        raise UserError('--complexity needs fvcore, which is not installed: pip install fvcore')
    runner = build_runner(prepare_config(args))
    if args.out:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    with whole_models():
        runner.test()
    if args.complexity and is_main_process():
        report_complexity(runner, args)


def main(arguments=None) -> int:
    """Evaluate; returns the exit code."""
    return run_tool(run, parse_args(arguments), quiet=False)


if __name__ == '__main__':
    sys.exit(main())

"""Train a classifier, a detector or a segmentor; the config says which.

python tools/train.py configs/demo/vmamba-nano_1xb64_digits-32px.py --work-dir work_dirs/digits
"""

import argparse
import sys

from mmvmamba.cli import run_tool
from mmvmamba.cli.launch import (
    add_common_arguments,
    build_runner,
    check_data,
    download,
    get_setting,
    load_config,
    use_atomic_checkpoints,
    use_loader_defaults,
)


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='path of the config')
    add_common_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from this checkpoint; without a value, from the newest in the work folder',
    )
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate while training')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help="scale the learning rate to the batch size by the config's rule"
    )
    return parser.parse_args(arguments)


def prepare_config(args: argparse.Namespace):
    """The config with what the command line asks for."""
    cfg = load_config(args)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        optim_wrapper = get_setting(cfg, 'optim_wrapper', needed='--amp')
        if optim_wrapper.get('type') == 'mmvmamba.FastOptimWrapper':
            optim_wrapper.dtype = optim_wrapper.get('dtype') or 'float16'
        else:
            optim_wrapper.type = 'AmpOptimWrapper'
            optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if cfg.get('load_from'):
        cfg.load_from = download(cfg.load_from)
    if args.auto_scale_lr:
        get_setting(cfg, 'auto_scale_lr.base_batch_size', int, '--auto-scale-lr')
        cfg.auto_scale_lr.enable = True
    use_atomic_checkpoints(cfg)
    use_loader_defaults(cfg)
    check_data(cfg, 'train')
    return cfg


def run(args: argparse.Namespace) -> None:
    """Train what the command line asks for."""
    build_runner(prepare_config(args)).train()


def main(arguments=None) -> int:
    """Train; returns the exit code."""
    return run_tool(run, parse_args(arguments), quiet=False)


if __name__ == '__main__':
    sys.exit(main())

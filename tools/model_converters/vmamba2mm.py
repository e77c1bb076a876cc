"""Convert an official VMamba checkpoint to OpenMMLab's names, for testing and for fine-tuning whole models.

python tools/model_converters/vmamba2mm.py OFFICIAL.pth OUT.pth [--weights model_ema]

A classifier's file becomes one of mmpretrain's ImageClassifier.  Files of detectors and segmentors have those names
already; early ones are brought up to date.
"""

import argparse
import re
import sys

from mmvmamba.checkpoint import (
    CheckpointError,
    backbone_weights,
    read_checkpoint,
    select_weights,
    upgrade_names,
    write_checkpoint,
)
from mmvmamba.cli import run_tool


def to_mm(content: dict, name: str) -> dict:
    """Rename the weights of an official checkpoint.

    Args:
        content (dict): What :func:`mmvmamba.checkpoint.read_checkpoint` returned.
        name (str): Name of the checkpoint, for errors.

    Returns:
        dict: ``state_dict``, and ``meta`` with what inference needs of the old one.

    Raises:
        CheckpointError: If it has no weights of a VMamba model.
    """
    state, _ = select_weights(content, name)
    if any(key.startswith('backbone.') for key in state):
        backbone_weights(state, name)  # raises if it is another backbone
        upgrade_names(state, 'backbone.')
        meta = content['meta'] if isinstance(content.get('meta'), dict) else {}
        return dict(state_dict=state, meta={key: meta[key] for key in ('dataset_meta', 'CLASSES') if key in meta})
    weights, left_out = backbone_weights(state, name)
    converted = {f'backbone.{key}': value for key, value in weights.items()}
    for key in left_out:
        head = re.fullmatch(r'classifier\.head\.(weight|bias)', key)
        if head is None:
            raise CheckpointError(f'checkpoint {name!r} has {key}, expected classifier.head and classifier.norm only')
    upgrade_names(state)
    for leaf in ('weight', 'bias'):
        if f'classifier.head.{leaf}' in state:
            converted[f'head.fc.{leaf}'] = state[f'classifier.head.{leaf}']
    return dict(state_dict=converted, meta={})


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='path or URL of the official checkpoint')
    parser.add_argument('target', help='file to write')
    parser.add_argument(
        '--weights',
        choices=('auto', 'model', 'model_ema'),
        default='auto',
        help='which weights: auto takes the averaged ones if the file records their accuracy (default: auto)',
    )
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    """Convert what the command line names."""
    content = read_checkpoint(args.source)
    if args.weights != 'auto':
        if not isinstance(content, dict) or args.weights not in content:
            raise CheckpointError(f'checkpoint {args.source!r} has no {args.weights}')
        content = {args.weights: content[args.weights]}
    converted = to_mm(content, args.source)
    write_checkpoint(converted, args.target)
    print(f'wrote {len(converted["state_dict"])} weights to {args.target}')


def main(arguments=None) -> int:
    """Convert; returns the exit code."""
    return run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

"""Convert a checkpoint of OpenMMLab to the official names, for the published code of VMamba.

python tools/model_converters/mm2vmamba.py TRAINED.pth OUT.pth

A classifier is converted as a whole; of a detector or segmentor the backbone is taken.
"""

import argparse
import sys

from mmvmamba.checkpoint import backbone_weights, read_checkpoint, select_weights, write_checkpoint
from mmvmamba.cli import run_tool


def to_official(content: dict, name: str) -> dict:
    """Rename the weights of a checkpoint of OpenMMLab.

    Args:
        content (dict): What :func:`mmvmamba.checkpoint.read_checkpoint` returned.
        name (str): Name of the checkpoint, for errors.

    Returns:
        dict: ``model``, as the published training code saves it.

    Raises:
        CheckpointError: If it has no weights of a VMamba model.
    """
    state, _ = select_weights(content, name)
    weights, _ = backbone_weights(state, name)
    if 'head.fc.weight' in state:
        norm = f'outnorm{max(int(key.split(".")[1]) for key in weights if key.startswith("layers."))}.'
        weights = {key.replace(norm, 'classifier.norm.'): value for key, value in weights.items()}
        weights['classifier.head.weight'] = state['head.fc.weight']
        weights['classifier.head.bias'] = state['head.fc.bias']
    return dict(model=weights)


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='path or URL of the checkpoint')
    parser.add_argument('target', help='file to write')
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    """Convert what the command line names."""
    converted = to_official(read_checkpoint(args.source), args.source)
    write_checkpoint(converted, args.target)
    print(f'wrote {len(converted["model"])} weights to {args.target}')


def main(arguments=None) -> int:
    """Convert; returns the exit code."""
    return run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

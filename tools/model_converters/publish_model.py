"""Reduce a checkpoint of a training run to what others need: one set of weights, named by its hash.

python tools/model_converters/publish_model.py TRAINED.pth OUT.pth [--weights averaged]

Writes OUT-<start of the SHA-256>.pth without optimizer, schedules and logs.  With averaged weights (EMA), ``averaged``
takes those and ``raw`` the ones that training stepped; mmengine saves the average as ``state_dict`` and the raw ones as
``ema_state_dict``, official files call them ``model_ema`` and ``model``.
"""

import argparse
import sys

from mmvmamba.checkpoint import CheckpointError, is_state, read_checkpoint, write_checkpoint
from mmvmamba.cli import run_tool

META = ('dataset_meta', 'CLASSES', 'epoch', 'iter')
PLACES = dict(averaged=('state_dict', 'model_ema', 'model'), raw=('ema_state_dict', 'state_dict', 'model'))


def reduce_checkpoint(content: dict, weights: str) -> dict:
    """Keep one set of weights of a checkpoint, in its own layout.

    Args:
        content (dict): Checkpoint of mmengine or of the published code.
        weights (str): ``averaged`` or ``raw``; without averaged weights both are the only ones there are.

    Returns:
        dict: ``state_dict`` and ``meta`` (mmengine), or ``model`` (official).

    Raises:
        CheckpointError: If there are no weights.
    """
    place = next((key for key in PLACES[weights] if isinstance(content, dict) and is_state(content.get(key))), None)
    if place is None:
        raise CheckpointError(
            f'no weights in the checkpoint, expected one of {", ".join(PLACES[weights])} with names and tensors'
        )
    state = content[place]
    if place == 'ema_state_dict':
        # it holds what training stepped under the names of the averaging wrapper; buffers may be in the other only
        wrapped = {key[len('module.') :]: value for key, value in state.items() if key.startswith('module.')}
        state = {**(content['state_dict'] if is_state(content.get('state_dict')) else {}), **wrapped}
    state = {key: value.detach().cpu() for key, value in state.items()}
    if place in ('model', 'model_ema'):
        return dict(model=state)
    meta = content['meta'] if isinstance(content.get('meta'), dict) else {}
    return dict(state_dict=state, meta={key: meta[key] for key in META if key in meta})


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='path or URL of the checkpoint')
    parser.add_argument('target', help='file to write; the hash is put before .pth')
    parser.add_argument('--weights', choices=tuple(PLACES), default='averaged', help='default: averaged')
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    """Publish what the command line names."""
    named = write_checkpoint(reduce_checkpoint(read_checkpoint(args.source), args.weights), args.target, True)
    print(f'wrote {named} ({named.stat().st_size / 2**20:.1f} MiB)')


def main(arguments=None) -> int:
    """Publish; returns the exit code."""
    return run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

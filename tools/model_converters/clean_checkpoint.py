"""Copy the weights, numbers and text of a checkpoint that holds other objects too, without running any code in it.

python tools/model_converters/clean_checkpoint.py TRAINED.pth CLEAN.pth

Objects of other classes (a Namespace of arguments, a config, a scheduler) are left out.
"""

import argparse
import sys
from collections import OrderedDict

import torch

from mmvmamba.checkpoint import CheckpointError, write_checkpoint
from mmvmamba.cli import UserError, run_tool

PLAIN = (torch.Tensor, str, bytes, int, float, bool, type(None))
OUT = object()


class Other:
    """Stands for an object of a class that is not read; whatever the file does to it does nothing."""

    def __new__(cls, *_, **__):
        return object.__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def __call__(self, *_, **__):
        return self

    def append(self, item):
        """Take an item of a list."""

    def extend(self, items):
        """Take items of a list."""

    add = append


def stand_in(path: str) -> type:
    """An ``Other`` under the name of a class or function, such as ``argparse.Namespace``; nothing is imported."""
    module, _, name = path.rpartition('.')
    kind: type = type(name, (Other,), {})
    kind.__module__, kind.__qualname__ = module, name
    return kind


def clean(value):
    """A value without objects of other classes; ``OUT`` if it is one."""
    if isinstance(value, dict):
        items = ((key, clean(item)) for key, item in value.items() if isinstance(key, (str, int)))
        return OrderedDict((key, item) for key, item in items if item is not OUT)
    if isinstance(value, (list, tuple)):
        items = [clean(item) for item in value]
        return type(value)(item for item in items if item is not OUT) if type(value) in (list, tuple) else OUT
    return value if isinstance(value, PLAIN) else OUT


def read(path: str):
    """The content of a file of ``torch.save``, with an ``Other`` for what torch does not know to be safe.

    Raises:
        UserError: If there is no such file, or torch is too old to list what a file holds.
        CheckpointError: If it can't be read.
    """
    if not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'):
        raise UserError(f'torch is {torch.__version__}, expected 2.5 or later, which lists what a file holds')
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([stand_in(name) for name in unsafe]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f'{path!r} is not a file, expected a checkpoint') from error
    except Exception as error:  # a damaged file raises anything
        reason = str(error).strip().split('\n')[0] or type(error).__name__
        raise CheckpointError(f'checkpoint {path!r} cannot be read ({reason})') from error


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='path of the checkpoint')
    parser.add_argument('target', help='file to write')
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    """Clean what the command line names."""
    content = clean(read(args.source))
    if not content or not isinstance(content, dict):
        raise CheckpointError(f'checkpoint {args.source!r} holds no dict with weights')
    print(f'wrote {write_checkpoint(content, args.target)} with {", ".join(map(str, list(content)[:6]))}')


def main(arguments=None) -> int:
    """Clean; returns the exit code."""
    return run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

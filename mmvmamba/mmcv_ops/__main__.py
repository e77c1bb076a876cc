"""``python -m mmvmamba.mmcv_ops place|remove|report``."""

import argparse
import sys

from .placing import place, remove
from .state import state


def report() -> int:
    """Print which ops ``mmcv.ops`` gets; the exit code is 1 if it gets none that work."""
    found = state()
    print(f'mmcv ops: {found.kind} ({found.reason})')
    if found.kind == 'stand-in':
        from .extension import FUNCTIONS  # needs a torchvision that works

        print(f'functions: {", ".join(FUNCTIONS)}; each other one raises NotImplementedError when called')
    return 0 if found.works else 1


def main(arguments=None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog='python -m mmvmamba.mmcv_ops', description="mmcv's ops over torchvision")
    parser.add_argument(
        'command',
        choices=('place', 'remove', 'report'),
        help="place the stand-in into mmcv's folder, remove it from there, or say which ops mmcv has",
    )
    command = parser.parse_args(arguments).command
    if command == 'report':
        return report()
    try:
        print(place() if command == 'place' else remove())
    except (OSError, ImportError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())

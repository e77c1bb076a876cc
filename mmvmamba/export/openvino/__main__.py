"""``python -m mmvmamba.export.openvino``: build the library for the installed OpenVINO."""

import argparse
import sys

from .build import build_library


def main(arguments=None) -> int:
    """Build the library and print its path; returns the exit code."""
    argparse.ArgumentParser(
        prog='python -m mmvmamba.export.openvino',
        description='Build the library that computes the scan inside OpenVINO, for the one that is installed.',
    ).parse_args(arguments)
    try:
        print(build_library())
    except (ImportError, OSError, RuntimeError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""Arguments that the tools share, and their checks before any work."""

import argparse
import os
from pathlib import Path
from typing import Optional

import torch

from .errors import UserError, first_line
from .models import NO_CHECKPOINT

MAX_SIDE = 8192  # pixels: a typing error must not ask for terabytes


def add_output_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--out-dir``, ``--force`` and ``--device``."""
    parser.add_argument(
        '--out-dir', type=Path, default=Path(default), help='where the results go (default: %(default)s)'
    )
    parser.add_argument('--force', action='store_true', help='replace the results that --out-dir holds')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='default: a GPU if there is one'
    )


def add_models_argument(parser: argparse.ArgumentParser, checkpoint: bool = True) -> None:
    """Add ``--model NAME CONFIG CHECKPOINT``, which may be given several times."""
    names = ('NAME', 'CONFIG', 'CHECKPOINT') if checkpoint else ('NAME', 'CONFIG')
    text = 'a model under the name it has in the results; CONFIG is a path or SCOPE::NAME, such as mmpretrain::...'
    if checkpoint:
        text += f'; CHECKPOINT is a path, a URL or {NO_CHECKPOINT!r}'
    parser.add_argument(
        '--model',
        dest='models',
        action='append',
        nargs=len(names),
        metavar=names,
        required=True,
        help=text + '; repeat it to compare models',
    )


def check_names(models: list) -> None:
    """Check that every ``--model`` has a name of its own."""
    names = [model[0] for model in models]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f'--model has the name {name!r} {names.count(name)} times, expected a different one each')


def parse_size(values, option: str = '--size') -> Optional[tuple]:
    """One or two numbers to (height, width), or None for None.

    Raises:
        UserError: If there are more, or one is below 32 or above ``MAX_SIDE``.
    """
    if values is None:
        return None
    if len(values) > 2 or min(values) < 32 or max(values) > MAX_SIDE:
        raise UserError(
            f'{option} is {" ".join(map(str, values))}, expected one or two numbers from 32 to {MAX_SIDE}: H [W]'
        )
    return values[0], values[-1]


def check_device(device: str) -> torch.device:
    """Check that torch can use a device.

    Raises:
        UserError: If it can't.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f'--device is {device!r}, which torch cannot use here: {first_line(error)}') from error
    return torch.device(device)


def check_out_dir(out_dir: Path, force: bool) -> None:
    """Check before any work that nothing would be overwritten; :func:`make_out_dir` makes the folder after it.

    Raises:
        UserError: If the folder has content and ``force`` is not set, the path is a file, or can't be written.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f'--out-dir is {str(out_dir)!r}, a file; expected a folder or a path that is free')
    if out_dir.is_dir() and any(out_dir.iterdir()) and not force:
        raise UserError(f'--out-dir {str(out_dir)!r} has content; expected an empty or new folder, or --force')
    check_writable(out_dir, '--out-dir')


def check_writable(path: Path, option: str) -> None:
    """Check that a folder, or the first one above it that exists, can be written.

    Raises:
        UserError: If it can't, or is no folder.
    """
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        state = 'cannot be written' if folder.is_dir() else 'is not a folder'
        raise UserError(f'{option} is {str(path)!r}, but {str(folder)!r} {state}')


def make_out_dir(out_dir: Path) -> Path:
    """Make the output folder.

    Raises:
        UserError: If it can't be made.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{str(out_dir)!r} cannot be made: {error.strerror}') from error
    return out_dir

"""Files that are whole or not there."""

import hashlib
import os
import shutil
from pathlib import Path

PART = '.part'  # what a file is called while it is being written


def commit(part: str, final: str) -> None:
    """Bring a written file (or folder) under its name: on disk first, then renamed, which the system does in one step.

    Args:
        part (str): What was written.
        final (str): Its name; replaced if it is there.
    """
    if os.path.isdir(part):
        shutil.rmtree(final, ignore_errors=True)
    else:
        _sync(part)
    os.replace(part, final)
    _sync(os.path.dirname(os.path.abspath(final)))


def write_whole(path, content: bytes) -> None:
    """Write a small file so that a reader finds the old content or the new one, never a part."""
    part = str(path) + PART
    Path(part).write_bytes(content)
    commit(part, str(path))


def remove(path: str) -> None:
    """Remove a file or folder if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.exists(path):
        os.remove(path)


def sha256(path: str) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for chunk in iter(lambda: file.read(2**20), b''):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

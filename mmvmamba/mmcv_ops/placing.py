"""A small ``_ext.py`` in mmcv's own folder, for commands that import ``mmcv.ops`` before anything of ours."""

import importlib
import os
from importlib import machinery, util
from pathlib import Path
from typing import Optional

from .finder import SWITCH, switched_off

MARK = '# Placed by mmvmamba; "python -m mmvmamba.mmcv_ops remove" removes it.'
TEXT = f"""{MARK}
# It stands for mmcv's compiled ops, which win where they are: Python looks for _ext*.so before _ext.py.
import sys
from importlib import import_module, util

package = util.find_spec('mmvmamba')
if package is None:
    raise ModuleNotFoundError(f'{{__file__}} needs mmvmamba, which is not installed; delete it', name='mmvmamba')
path = package.submodule_search_locations[0] + '/mmcv_ops/__init__.py'
spec = util.spec_from_file_location('mmvmamba_mmcv_ops', path)  # alone: mmvmamba itself is not imported
sys.modules[spec.name] = util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
import_module(spec.name + '.finder').fill(globals())
"""


def mmcv_folder() -> Optional[Path]:
    """The folder of the installed mmcv, without importing it; None if there is none."""
    spec = util.find_spec('mmcv')
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def compiled_file(folder: Path) -> Optional[Path]:
    """The compiled ``_ext`` in mmcv's folder that this Python can load; None without one."""
    files = (folder / f'_ext{suffix}' for suffix in machinery.EXTENSION_SUFFIXES)
    return next((path for path in files if path.exists()), None)


def is_placed(folder: Path) -> bool:
    """Whether ``_ext.py`` in mmcv's folder is ours."""
    path = folder / '_ext.py'
    return path.is_file() and path.read_bytes().startswith(MARK.encode())


def place() -> str:
    """Write the stand-in into mmcv's folder, unless compiled ops are there.

    Returns:
        str: What was done, or why nothing was.

    Raises:
        ImportError: Without an installed mmcv, or if ``MMVMAMBA_MMCV_OPS=off``.
        FileExistsError: For an ``_ext`` in mmcv's folder that is not ours.
        OSError: If the folder cannot be written.
    """
    folder = _folder()
    if switched_off():
        raise ImportError(f'nothing is placed while {SWITCH}=off')
    compiled = compiled_file(folder)
    if compiled is not None:
        return f'{compiled} is compiled and wins: nothing placed'
    path = folder / '_ext.py'
    if (folder / '_ext').exists() or (os.path.lexists(path) and not is_placed(folder)):
        raise FileExistsError(f'{folder} has an _ext that mmvmamba did not place; it is left as it is')
    if path.exists() and path.read_text() == TEXT:
        return f'{path} is in place'
    draft = folder / f'_ext.{os.getpid()}.part'
    try:
        draft.write_text(TEXT)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    importlib.invalidate_caches()
    return f'placed {path}'


def remove() -> str:
    """Remove what :func:`place` wrote, and nothing else.

    Returns:
        str: What was done, or why nothing was.

    Raises:
        ImportError: Without an installed mmcv.
        OSError: If the file cannot be removed.
    """
    folder = _folder()
    if not is_placed(folder):
        return f'{folder} has no _ext.py of mmvmamba: nothing removed'
    path = folder / '_ext.py'
    path.unlink()
    Path(util.cache_from_source(str(path))).unlink(missing_ok=True)
    importlib.invalidate_caches()
    return f'removed {path}'


def _folder() -> Path:
    folder = mmcv_folder()
    if folder is None:
        raise ImportError("mmcv is not installed: pip install 'mmcv-lite==2.1.0'")
    return folder

"""Which of the names that other projects import is installed, provided by mmvmamba, or broken."""

import importlib
import importlib.util
import logging
import sys
from dataclasses import dataclass
from typing import Sequence

from .finder import EXTENSIONS, FINDER, NAMES, REPLACEMENT, is_provided

logger = logging.getLogger('mmvmamba.compat')


@dataclass(frozen=True)
class Name:
    """What an import of one name gets.

    Attributes:
        name (str): Such as ``selective_scan_cuda_oflex``.
        kind (str): ``installed``; ``provided``; ``broken`` (installed, but it fails to load); or, before
            :func:`install`, ``missing``.
        reason (str): Where it comes from, or what is wrong and what to do.
    """

    name: str
    kind: str
    reason: str


def install(replace: Sequence[str] = ()) -> list:
    """Let this process import what other projects need of mamba_ssm's and VMamba's compiled code.

    What is installed wins, also if it comes to the path later, and what is imported stays as it is.

    Args:
        replace (Sequence[str]): Names whose installation is not to be used, because it does not load or refuses CPU
            tensors. Default: none.

    Returns:
        list[Name]: What each name gets; it is logged too.

    Raises:
        ValueError: If ``replace`` has a name that is none of :data:`mmvmamba.compat.finder.NAMES`.
        ImportError: If ``replace`` has a name that was imported before, and is not ours.
    """
    if isinstance(replace, str):
        raise ValueError(f'replace is {replace!r}, expected a list of names: [{replace!r}]')
    for name in replace:
        if name not in NAMES:
            raise ValueError(f'replace has {name!r}, expected some of {", ".join(NAMES)}')
        if name in sys.modules and not is_provided(name):
            raise ImportError(
                f'{name} was imported before, from {_place(sys.modules[name])}; install before its first import'
            )
    REPLACEMENT.names.update(replace)
    if replace:
        REPLACEMENT.install()
    FINDER.install()
    importlib.invalidate_caches()
    rows = table()
    level = logging.WARNING if any(row.kind == 'broken' for row in rows) else logging.INFO
    logger.log(level, f'names of other projects:\n{format_table(rows)}')
    return rows


def table() -> list:
    """What an import of each name gets in this process.

    Installed compiled modules are imported, to see whether they load; packages are not.

    Returns:
        list[Name]: One for each of :data:`mmvmamba.compat.finder.NAMES`.
    """
    return [_look_up(name) for name in NAMES]


def format_table(rows: Sequence[Name]) -> str:
    """Lines for people, one a name."""
    width = max(len(row.name) for row in rows)
    return '\n'.join(f'  {row.name:{width}}  {row.kind:9}  {row.reason}' for row in rows)


def _look_up(name: str) -> Name:
    if name in sys.modules:
        if sys.modules[name] is None:
            return Name(name, 'broken', 'its import is blocked: sys.modules has None')
        if is_provided(name):
            return Name(name, 'provided', 'by mmvmamba, imported')
        return Name(name, 'installed', f'imported from {_place(sys.modules[name])}')
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        return Name(name, 'broken', f'{type(error).__name__}: {error}')
    if spec is None:
        return Name(name, 'missing', 'not installed; mmvmamba.compat.install() provides it')
    if spec.loader is REPLACEMENT:
        return Name(name, 'provided', 'by mmvmamba, in place of what is installed')
    if spec.loader is FINDER:
        return Name(name, 'provided', 'by mmvmamba, since nothing of that name is installed')
    if spec.loader is None:
        folder = next(iter(spec.submodule_search_locations or ['']))
        return Name(name, 'broken', f'{folder} is a folder without code; {_replace(name)} provides it')
    if name in EXTENSIONS:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken library raises is the answer
            what = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}'
            return Name(name, 'broken', f'{spec.origin} fails with {what}; {_replace(name)} provides it')
    hint = '' if _has_gpu() else f'; if it refuses CPU tensors: {_replace(name)}'
    return Name(name, 'installed', f'{spec.origin}{hint}')


def _replace(name: str) -> str:
    return f'mmvmamba.compat.install(replace=[{name!r}])'


def _place(module) -> str:
    return getattr(module, '__file__', None) or repr(module)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()

"""Running a script as ``python script.py`` does, with the names provided, also in the processes that it starts.

A process that is spawned imports the script's main module again, under the name in that module's ``__spec__``.  That
name is :mod:`mmvmamba.compat.child` here, which provides the names first.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from typing import Any, Optional, Sequence

CHILD = f'{__package__}.child'
_LOADERS: Any = (importlib.machinery.SourceFileLoader, importlib.machinery.SourcelessFileLoader)
# for the processes that the script starts: its path or name, whether it is a module, and the names to replace
VARIABLE = 'MMVMAMBA_COMPAT_SCRIPT'


def run_script(path: str, arguments: Sequence[str], replace: Sequence[str]) -> None:
    """Run a file as the main module.

    Args:
        path (str): The script.
        arguments (Sequence[str]): Its own arguments.
        replace (Sequence[str]): As given to :func:`mmvmamba.compat.install`.
    """
    sys.argv = [path, *arguments]
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    path = os.path.abspath(path)  # which a script finds its neighbours by, also after it changed the folder
    os.environ[VARIABLE] = json.dumps([path, False, list(replace)])
    _run(_Script('__main__', path), path, None)


class _Script(importlib.machinery.SourceFileLoader):
    """Leaves no compiled file beside a script, as Python leaves none."""

    def set_data(self, path, data, **_):
        pass


def run_module(name: str, arguments: Sequence[str], replace: Sequence[str]) -> None:
    """Run a module as ``python -m`` does, of a package its module ``__main__``.

    Args:
        name (str): The module.
        arguments (Sequence[str]): Its own arguments.
        replace (Sequence[str]): As given to :func:`mmvmamba.compat.install`.

    Raises:
        LookupError: If there is no such module.
    """
    sys.path[0] = os.getcwd()
    os.environ[VARIABLE] = json.dumps([name, True, list(replace)])
    spec = find_module(name)
    if spec is None:
        raise LookupError(f'there is no module {name}')
    sys.argv = [str(spec.origin), *arguments]
    kind: Any = _Script if isinstance(spec.loader, importlib.machinery.SourceFileLoader) else type(spec.loader)
    _run(kind('__main__', spec.origin), spec.origin, spec.parent)


def find_module(name: str) -> Optional[importlib.machinery.ModuleSpec]:
    """What ``python -m`` would run; None if there is no such module."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f'{name}.__main__')
    except ModuleNotFoundError as error:
        if error.name is None or not f'{name}.'.startswith(f'{error.name}.'):  # raised by a package above it
            raise
        return None
    return spec if spec is not None and isinstance(spec.loader, _LOADERS) else None


class _MainSpec(importlib.machinery.ModuleSpec):
    """That of :mod:`mmvmamba.compat.child`, in the package of the main module, for its relative imports."""

    package: Optional[str] = None

    @property
    def parent(self):
        return self.package


def _run(loader: Any, path: Optional[str], package: Optional[str]) -> None:
    main = types.ModuleType('__main__')
    child = importlib.util.find_spec(CHILD)
    assert child is not None
    spec = _MainSpec(CHILD, child.loader, origin=child.origin)
    spec.package = package
    main.__file__, main.__loader__, main.__package__, main.__spec__ = path, loader, package, spec
    sys.modules['__main__'] = sys.modules['__mp_main__'] = main  # the second is what spawned processes call it
    loader.exec_module(main)

"""Running a script as ``python script.py`` does, with the names provided, also in the processes that it starts.

A process that is spawned imports the script's main module again, under the name in that module's ``__spec__``.  That
name is :mod:`mmvmamba.compat.child` here, which provides the names first.
"""

import importlib.machinery
import importlib.util
import json
import os
import runpy
import sys
import types
from typing import Sequence

CHILD = f'{__package__}.child'
VARIABLE = 'MMVMAMBA_COMPAT_SCRIPT'  # for the processes that the script starts: its path, and the names to replace


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
    os.environ[VARIABLE] = json.dumps([path, list(replace)])
    main, script = types.ModuleType('__main__'), _Script('__main__', path)
    main.__file__, main.__loader__, main.__spec__ = path, script, importlib.util.find_spec(CHILD)
    sys.modules['__main__'] = sys.modules['__mp_main__'] = main  # the second is what spawned processes call it
    script.exec_module(main)


class _Script(importlib.machinery.SourceFileLoader):
    """Leaves no compiled file beside a script, as Python leaves none."""

    def set_data(self, path, data, **_):
        pass


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Run a module as ``python -m`` does; processes that it spawns provide no names of their own."""
    sys.argv = [name, *arguments]
    sys.path[0] = os.getcwd()
    runpy.run_module(name, run_name='__main__', alter_sys=True)

"""The main module of a process that a script spawned, see :mod:`mmvmamba.compat.script`."""

import json
import os
import runpy

from mmvmamba.compat.script import VARIABLE
from mmvmamba.compat.table import install

if __name__ == '__mp_main__':
    path, replace = json.loads(os.environ[VARIABLE])
    install(replace)
    globals().update(runpy.run_path(path, run_name='__mp_main__'))

"""The main module of a process that a script started, see :mod:`mmvmamba.compat.script`."""

import json
import os
import runpy
import sys

from mmvmamba.compat.script import VARIABLE, run_module, run_script
from mmvmamba.compat.table import install

if __name__ in ('__mp_main__', '__main__'):
    what, is_module, replace = json.loads(os.environ[VARIABLE])
    install(replace)
    if __name__ == '__main__':  # launchers start the main module anew by the name in its __spec__
        (run_module if is_module else run_script)(what, sys.argv[1:], replace)
    else:
        run = runpy.run_module if is_module else runpy.run_path
        globals().update(run(what, run_name='__mp_main__'))

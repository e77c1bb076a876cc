"""``python -m mmvmamba.compat [--replace NAME,...] script.py ARGS...`` runs a script with the names provided."""

import argparse
import os
import sys

from .script import find_module, run_module, run_script
from .table import format_table, install

USAGE = 'python -m mmvmamba.compat [--replace NAMES] [script.py | -m MODULE] [arguments of the script]'


def main(arguments=None) -> int:
    """Provide the names, then run a script as ``python`` would; without one print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m mmvmamba.compat', usage=USAGE, description='Run a script whose compiled scan is not installed.'
    )
    parser.add_argument('--replace', default='', metavar='NAMES', help='installed names to replace, with commas')
    parser.add_argument('-m', dest='module', action='store_true', help='run a module, as python -m does')
    parser.add_argument('script', nargs='?', help='the script or module; without one, the table of names is printed')
    parser.add_argument('rest', nargs=argparse.REMAINDER, help="the script's own arguments")
    options = parser.parse_args(arguments)
    replace = [name for name in options.replace.split(',') if name]
    try:
        rows = install(replace)
    except (ValueError, ImportError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    if options.script is None:
        print(format_table(rows))
        return 1 if any(row.kind == 'broken' for row in rows) else 0
    if not options.module and not os.path.isfile(options.script):
        print(f'error: there is no script {options.script}', file=sys.stderr)
        return 1
    if options.module and find_module(options.script) is None:
        print(f'error: there is no module {options.script}', file=sys.stderr)
        return 1
    if options.module:
        run_module(options.script, options.rest, replace)
    else:
        run_script(options.script, options.rest, replace)
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""The compiled extension: whether it is there, loads and fits, and the numbers of its kernels."""

import json
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
REBUILD = 'pip install --no-build-isolation --force-reinstall --no-deps mmvmamba'


@cache
def load_extension() -> str:
    """Load the compiled extension once; before anything is defined in Python, since it defines the ops too.

    Returns:
        str: Empty if it is loaded and fits, else the reason why it does not serve.
    """
    libraries = sorted(FOLDER.glob('_C*.so')) + sorted(FOLDER.glob('_C*.pyd'))
    if not libraries:
        hint = 'build it with a C++ compiler present: pip install --no-build-isolation mmvmamba'
        return f'the compiled extension is not built ({build_info().get("reason") or hint})'
    name = libraries[0].name
    built_for = build_info().get('torch') or torch.__version__
    if _release(built_for) != _release(torch.__version__):
        return (
            f'the compiled extension {name} was built for torch {built_for} and this is {torch.__version__}; '
            f'install the wheel mmvmamba-...+{wheel_tag()}, or rebuild it with: {REBUILD}'
        )
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        return (
            f'the compiled extension {name} does not load with torch {torch.__version__} ({error}); '
            f'rebuild it with: {REBUILD}'
        )
    stale = _find_stale()
    if stale:
        return (
            f'the compiled extension {name} does not fit these sources, which have another mmvmamba::{stale}; '
            f'rebuild it with: {REBUILD}'
        )
    return ''


def _release(version: str) -> str:
    return '.'.join(version.split('+')[0].split('.')[:2])


def wheel_tag() -> str:
    """The local version of the wheel that fits the installed torch, such as ``torch2.14cu130``; setup.py names it."""
    cuda = torch.version.cuda
    return f'torch{_release(torch.__version__)}' + (f'cu{cuda.replace(".", "")}' if cuda else 'cpu')


def build_info() -> dict:
    """What setup.py wrote down of the build: ``built``, ``reason``, ``torch`` and, of CUDA, ``arches``."""
    try:
        return json.loads((FOLDER / '_build_info.json').read_text())
    except (OSError, ValueError):
        return {}


def read_schemas(file: Path) -> list:
    """The schemas in a room's ``schema.inc``, a C++ string: one in each line that is not indented, with those after."""
    text = file.read_text().strip().removeprefix('R"(').removesuffix(')"')
    return [' '.join(schema.split()) for schema in text.strip().replace('\n ', '  ').splitlines()]


def defined_schema(op: str) -> str:
    """The schema that ``mmvmamba::<op>`` is defined with, or nothing."""
    schemas = torch._C._jit_get_schemas_for_operator(f'mmvmamba::{op}')
    return str(schemas[0]) if schemas else ''


def _find_stale() -> str:
    """The first op whose schema in the extension is another than in the sources, or nothing."""
    for file in sorted(FOLDER.rglob('schema.inc')):
        for schema in read_schemas(file):
            op = schema.split('(')[0]
            if defined_schema(op) != str(torch._C.parse_schema(f'mmvmamba::{schema}')):
                return op
    return ''


def read_constants() -> dict:
    """Numbers of the kernels as lists, such as ``selective_scan.cpu.chunk``; none without the extension."""
    return {} if load_extension() else dict(torch.ops.mmvmamba.constants())

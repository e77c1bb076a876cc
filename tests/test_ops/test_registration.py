"""How ops are registered: schemas from one text, constants from the extension, and an extension that does not fit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmvmamba.ops import SCAN_MODES, backend_report, extension
from mmvmamba.ops.backend import OP_BACKENDS
from mmvmamba.ops.cross_scan.routes import ROUTES
from mmvmamba.ops.registration import CONSTANTS
from mmvmamba.ops.selective_scan.registration import TRITON_CHUNK
from tests.test_ops.scan_inputs import make_scan_inputs
from tests.test_ops.ss2d_inputs import make_map, make_parameters

ROOT = Path(__file__).parents[2]
CPU = {status.name: status for status in backend_report()}['cpu']
needs_extension = pytest.mark.skipif(not CPU.available, reason=CPU.reason)
SCHEMAS = [schema for file in sorted(extension.FOLDER.rglob('schema.inc')) for schema in extension.read_schemas(file)]
NAMES = [schema.split('(')[0] for schema in SCHEMAS]
TRITON = ('selective_scan', 'cross_scan', 'cross_merge', 'ss2d_scan', 'ssd_scan')


@pytest.mark.parametrize('schema', SCHEMAS, ids=NAMES)
def test_schemas_hold_what_any_executor_reads(schema):
    """torch's ahead-of-time executor misreads ScalarType; and a string would choose a kernel behind the dispatcher."""
    parsed = torch._C.parse_schema(schema)
    assert {str(argument.type) for argument in parsed.arguments} <= {
        'Tensor',
        'Optional[Tensor]',
        'int',
        'bool',
        'float',
    }
    assert extension.defined_schema(parsed.name) == str(torch._C.parse_schema(f'mmvmamba::{schema}'))
    overload = getattr(torch.ops.mmvmamba, parsed.name).default
    assert torch.Tag.pt2_compliant_tag in overload.tags


@pytest.mark.parametrize('op', TRITON)
def test_triton_ops_have_the_schemas_of_the_others(op):
    for name in {op, f'{op}_backward'} & set(NAMES):
        own = str(getattr(torch.ops.mmvmamba, name.replace(op, f'{op}_triton')).default._schema)
        assert own.replace(f'{op}_triton', op) == extension.defined_schema(name)


def test_every_op_says_which_backends_it_has():
    assert set(OP_BACKENDS) == {name for name in NAMES if not name.endswith('_backward')}
    assert {op for op, backends in OP_BACKENDS.items() if 'triton' in backends} == set(TRITON)


@needs_extension
def test_constants_of_the_kernels():
    for mode, name in enumerate(SCAN_MODES):
        routes = ROUTES[name]
        assert CONSTANTS['routes.column'][mode] == sum(column << k for k, (column, _) in enumerate(routes))
        assert CONSTANTS['routes.reverse'][mode] == sum(reverse << k for k, (_, reverse) in enumerate(routes))
    assert CONSTANTS['selective_scan.cpu.chunk'] == [64] and TRITON_CHUNK == 256


@needs_extension
@pytest.mark.parametrize('op', ['', '_triton'])
def test_what_the_schemas_foresee_is_refused_by_name(op):
    arguments = [*make_scan_inputs(batch=1, channels=4, length=6).values(), True, True]
    scan = getattr(torch.ops.mmvmamba, f'selective_scan{op}')
    pytest.importorskip('triton')
    for name, value in (('z', arguments[0]), ('initial_state', torch.zeros(1, *arguments[2].shape))):
        with pytest.raises(NotImplementedError, match=f'selective_scan: {name} is not implemented yet'):
            scan(*arguments, **{name: value})
    arguments[1] = arguments[1][:, :2]
    with pytest.raises(NotImplementedError, match='selective_scan: delta has 2 channels'):
        scan(*arguments)
    x = make_map(1, 8, 3, 3)
    with pytest.raises(NotImplementedError, match='ss2d_scan: z is not implemented yet'):
        getattr(torch.ops.mmvmamba, f'ss2d_scan{op}')(x, *make_parameters(8, 2), 0, False, False, z=x)


USE = (
    'import torch; from mmvmamba.ops import backend_report, selective_scan, layer_norm\n'
    'x = torch.randn(1, 4, 9); b = torch.randn(1, 2, 1, 9)\n'
    'y = selective_scan(x, x, -torch.ones(4, 1), b, b); layer_norm(x, torch.ones(9), torch.zeros(9))\n'
    'print(torch.ops.mmvmamba.selective_scan_triton.default._schema)\n'
    'print(backend_report()[1].reason)\n'
)


@needs_extension
@pytest.mark.parametrize(
    'change, words',
    [
        ('another schema', ('does not fit these sources', 'another mmvmamba::selective_scan;', 'rebuild it with: pip')),
        ('a new op', ('does not fit these sources', 'another mmvmamba::novelty;', 'rebuild it with: pip')),
        ('no library', ('does not load with torch', 'rebuild it with: pip')),
        ('nothing', ('is not built',)),
    ],
)
def test_an_extension_that_does_not_fit_is_no_error_of_the_import(change, words, tmp_path):
    shutil.copytree(ROOT / 'mmvmamba', tmp_path / 'mmvmamba', ignore=shutil.ignore_patterns('.mim', '__pycache__'))
    ops = tmp_path / 'mmvmamba/ops'
    shutil.copytree(ROOT / 'ops', ops, ignore=shutil.ignore_patterns('csrc', '__pycache__', '*.json'))
    (library,) = ops.glob('_C*')
    schema = ops / 'selective_scan/schema.inc'
    if change == 'another schema':
        schema.write_text(schema.read_text().replace('bool float_output', 'bool float_output, int order'))
    elif change == 'a new op':
        schema.write_text('R"(\nnovelty(Tensor x) -> Tensor' + schema.read_text().removeprefix('R"('))
        registration = ops / 'selective_scan/registration.py'
        text = registration.read_text().replace('selective_scan=_fake,', 'selective_scan=_fake, novelty=_fake,')
        registration.write_text(text)
    elif change == 'no library':
        library.write_bytes(b'no library')
    else:
        library.unlink()
    environment = {**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'}
    result = subprocess.run(
        [sys.executable, '-c', USE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    *_, schema, reason = result.stdout.splitlines()  # after what was logged
    assert schema.startswith('mmvmamba::selective_scan_triton(') and all(word in reason for word in words), reason

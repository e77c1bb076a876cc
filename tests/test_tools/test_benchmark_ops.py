"""tools/benchmark/ops.py: what it compares with is right, what is wrong is refused before it is timed, and it runs."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from mmvmamba.ops import selective_scan
from tests.test_ops.scan_inputs import make_scan_inputs, relative_error
from tests.test_tools.conftest import load_tool


@pytest.fixture
def tool(monkeypatch):
    """The script, with shapes small enough for the naive loop."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / 'tools/benchmark')
    module = load_tool('benchmark/ops.py')
    monkeypatch.setattr(module, 'CPU_SCAN_SHAPES', [(1, 4, 3, 1, 4, 5)])
    monkeypatch.setattr(module, 'CPU_CORE_SHAPES', [(1, 8, 4, 5, 2)])
    monkeypatch.setattr(module, 'CPU_SSD_SHAPES', [(1, 8, 4, 5, 2, 3)])
    monkeypatch.setattr(module, 'CPU_CROSS_SHAPES', [(1, 3, 4, 5)])
    monkeypatch.setattr(module.timing, 'copy_ceiling', lambda device: 1.0)
    return module


class _NaNGradient(torch.autograd.Function):
    """Passes its input on; the gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, math.nan)


def test_a_nan_gradient_is_an_error(tool):
    inputs, dout = [torch.ones(3), torch.ones(3)], torch.ones(3)
    error = tool.error_against(lambda a, b: a + _NaNGradient.apply(b), lambda a, b: a + b, inputs, dout)
    assert math.isnan(error)
    for wrong in (error, math.inf, 1e-4):
        with pytest.raises(SystemExit, match='op 1x2: fast is wrong'):
            tool.check_error('op', (1, 2), 'fast', wrong, torch.float32)
    tool.check_error('op', (1, 2), 'fast', 1e-6, torch.float32)


@pytest.mark.parametrize('op', ['selective_scan', 'ss2d_scan', 'ssd_scan'])
def test_a_wrong_backend_is_refused_before_it_is_timed(tool, op, monkeypatch):
    right = getattr(tool, op)

    def wrong(*arguments, backend, **options):
        out = right(*arguments, backend='naive', **options)
        return _NaNGradient.apply(out) if backend == 'cpu' else out

    def time_ms(*arguments, **options):
        raise AssertionError('timed')

    monkeypatch.setattr(tool, op, wrong)
    monkeypatch.setattr(tool.timing, 'time_ms', time_ms)
    with pytest.raises(SystemExit, match=f'{op} .*: cpu.* is wrong, relative error nan'):
        list(tool.CASES[op]('cpu', torch.float32, ['cpu'], 1.0, 1))


def test_a_wrong_map_is_refused(tool, monkeypatch):
    monkeypatch.setattr(tool, 'cross_merge', lambda y, *arguments: torch.full((1, 3, 4, 5), math.nan))
    with pytest.raises(SystemExit, match='naive is wrong, relative error nan'):
        next(tool.cross_cases('cpu', torch.float32, ['naive'], 1.0, 1))


def test_runs_without_the_compiled_backend(tool, tmp_path, capsys):
    file = tmp_path / 'rows.json'
    tool.main(['--device', 'cpu', '--backends', 'naive', '--repeats', '1', '--out', str(file)])
    report = json.loads(file.read_text())
    rows = [(row['op'].split(',')[0], row['backend']) for row in report['rows']]
    assert {op for op, backend in rows if backend == 'naive'} == {
        'selective_scan',
        'ss2d_scan',
        'ssd_scan',
        'cross_scan',
    }
    assert len(rows) == 3 + 1 + 1 + 2 and report['cpu_faster_by'] == {}
    assert all(row['error'] < 5e-5 and row['total_ms'] > 0 for row in report['rows'])
    with pytest.raises(SystemExit):
        tool.main(['--device', 'cpu', '--backends', 'cuda'])
    assert '--backends cuda: none can run on cpu' in capsys.readouterr().err


def test_ratios(tool):
    times = {'cpu': 2.0, 'naive': 40.0, 'torch chunked': 8.0, 'torch log_step': 6.0}
    rows = [dict(op='selective_scan', backend=name, forward_ms=t, total_ms=2 * t) for name, t in times.items()]
    expected = dict(naive=20.0, best_torch=3.0)
    assert tool.ratios(rows) == dict(forward_ms=expected, total_ms=expected)
    assert tool.ratios(rows[1:]) == {} == tool.ratios([])


def test_the_loop_is_not_timed_on_large_maps(tool):
    assert tool.timed_backends(['cuda', 'naive'], 56, 56) == ['cuda', 'naive']
    assert tool.timed_backends(['cuda', 'naive'], 200, 336) == ['cuda']


@pytest.mark.parametrize('length', [1, 55, 56, 57, 300])
@pytest.mark.parametrize('formulation', ['chunked', 'log_step'])
def test_torch_formulations(formulation, length, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / 'tools/benchmark')
    torch_scan = importlib.import_module('torch_scan')
    results = []
    for scan in (
        lambda **inputs: torch_scan.selective_scan(**inputs, formulation=formulation),
        lambda **inputs: selective_scan(**inputs, delta_softplus=True, backend='naive'),
    ):
        leaves = {name: value.requires_grad_() for name, value in make_scan_inputs(length=length).items()}
        out = scan(**leaves)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), list(leaves.values()))])
    for value, expected in zip(*results):
        assert relative_error(value, expected) < 5e-5 or torch.equal(value, expected)

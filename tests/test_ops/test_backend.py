"""The backend API: the report, the order of precedence, and that a named backend never gives way silently."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from mmvmamba.ops import BackendError, backend, backend_report, cross_scan, selective_scan, use_backend
from tests.test_ops.scan_inputs import make_scan_inputs

STATUS = {status.name: status for status in backend_report()}


@pytest.fixture
def served(monkeypatch):
    """Function that makes one call and returns the name of the backend that served it."""
    names = []
    monkeypatch.setattr(backend, '_announce', lambda op, device, name: names.append(name))

    def call(**options):
        cross_scan(torch.ones(1, 1, 2, 2), **options)
        return names[-1]

    return call


@pytest.fixture
def status(monkeypatch):
    """Function that pretends that a backend can or can't run."""
    real = backend._status

    def pretend(**available):
        def fake(name):
            entry = real(name)
            if name not in available:
                return entry
            return backend.BackendStatus(name, available[name], 'pretended', entry.devices)

        monkeypatch.setattr(backend, '_status', fake)

    return pretend


def test_report_lists_every_backend_with_a_reason():
    assert [status.name for status in backend_report()] == ['naive', 'cpu', 'triton', 'cuda']
    assert all(status.reason for status in backend_report())
    assert STATUS['naive'].available
    if not torch.cuda.is_available():
        assert not STATUS['cuda'].available and 'no CUDA GPU' in STATUS['cuda'].reason


@pytest.mark.skipif(not STATUS['cpu'].available, reason=f'no compiled CPU backend: {STATUS["cpu"].reason}')
def test_precedence(served, monkeypatch):
    assert served() == 'cpu'
    monkeypatch.setenv('MMVMAMBA_BACKEND', 'naive')
    assert served() == 'naive'
    with use_backend('cpu'):
        assert served() == 'cpu'
        with use_backend('naive'):
            assert served() == 'naive'
            assert served(backend='cpu') == 'cpu'
            assert served(backend='auto') == 'cpu'
        with use_backend('auto'):
            assert served() == 'cpu'
        assert served() == 'cpu'
    assert served() == 'naive'
    monkeypatch.setenv('MMVMAMBA_BACKEND', '')
    assert served() == 'cpu'


def test_use_backend_is_undone_by_an_error(served):
    with pytest.raises(KeyError), use_backend('naive'):
        raise KeyError
    assert served(backend='naive') == 'naive' and backend._requested.get() is None


def test_unknown_names_are_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"backend is 'gpu', expected one of naive, cpu, triton, cuda, auto"):
        cross_scan(torch.ones(1, 1, 2, 2), backend='gpu')
    with pytest.raises(ValueError, match=r"backend is 'fast'"), use_backend('fast'):
        pass
    monkeypatch.setenv('MMVMAMBA_BACKEND', 'Cuda')
    with pytest.raises(ValueError, match=r"MMVMAMBA_BACKEND is 'Cuda'"):
        cross_scan(torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize('name', ['triton', 'cuda'])
def test_a_named_backend_that_can_not_serve_raises(name, monkeypatch):
    x = torch.ones(1, 1, 2, 2)
    message = rf'cross_scan: backend .{name}. (can not run here: .*\w|takes cuda tensors, but the tensors are on cpu)'
    with pytest.raises(BackendError, match=message):
        cross_scan(x, backend=name)
    monkeypatch.setenv('MMVMAMBA_BACKEND', name)
    with pytest.raises(BackendError, match=message):
        cross_scan(x)
    if not STATUS[name].available:
        with pytest.raises(BackendError, match=f'{name}.*{STATUS[name].reason}'), use_backend(name):
            pass


def test_a_backend_of_another_device_raises(status):
    status(cuda=True)
    with pytest.raises(BackendError, match=r"backend 'cuda' takes cuda tensors, but the tensors are on cpu"):
        cross_scan(torch.ones(1, 1, 2, 2), backend='cuda')


def test_without_the_extension_cpu_falls_to_naive(status, served):
    status(cpu=False)
    assert served() == 'naive'
    with pytest.raises(BackendError, match=r"'cpu' can not run here: pretended"):
        served(backend='cpu')


def test_training_on_a_gpu_never_falls_to_naive(status):
    status(cuda=False, triton=False)
    with pytest.raises(BackendError, match=r"selective_scan: neither compiled.*backend='naive' by name"):
        backend.resolve('selective_scan', 'cuda', training=True)
    assert backend.resolve('selective_scan', 'cuda', training=False) == 'naive'
    assert backend.resolve('selective_scan', 'cuda', 'naive', training=True) == 'naive'


@pytest.mark.parametrize('available', [('cuda', 'triton'), ('cuda',), ('triton',)], ids='-'.join)
def test_auto_takes_a_compiled_backend_on_a_gpu(available, status):
    status(cuda='cuda' in available, triton='triton' in available)
    for op in ('selective_scan', 'cross_scan', 'cross_merge', 'ss2d_scan'):
        assert backend.resolve(op, 'cuda', training=True) in available


@pytest.mark.parametrize(
    'options, expected',
    [({}, 'triton'), (dict(short=True), 'cuda'), (dict(training=True), 'cuda'), (dict(d_state=2), 'cuda')],
    ids=str,
)
def test_auto_takes_the_faster_scan_on_a_gpu(options, expected, status):
    """Of the shapes in the rule's table."""
    status(cuda=True, triton=True)
    assert backend.resolve('selective_scan', 'cuda', **options) == expected


def test_first_use_is_logged_once(monkeypatch):
    messages = []
    monkeypatch.setattr(backend, '_announced', set())
    monkeypatch.setattr(
        logging.getLogger('mmvmamba.ops'), 'handle', lambda record: messages.append(record.getMessage())
    )
    for _ in range(3):
        selective_scan(**make_scan_inputs(length=2), backend='naive')
    assert len(messages) == 1 and messages[0].startswith('selective_scan on cpu runs on the naive backend')


@pytest.mark.parametrize(
    'setting, expected', [('naive', 'naive'), ('triton', 'BackendError'), ('nothing', 'ValueError')], ids=str
)
def test_environment_variable_of_a_process(setting, expected):
    code = (
        'import torch; from mmvmamba.ops import backend, cross_scan\n'
        'try:\n'
        '    cross_scan(torch.ones(1, 1, 2, 2)); print(backend._announced)\n'
        'except Exception as error:\n'
        '    print(type(error).__name__)\n'
    )
    environment = {**os.environ, 'MMVMAMBA_BACKEND': setting}
    result = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert expected in result.stdout, result.stderr

"""The backend API: the report, the order of precedence, and that a named backend never gives way silently."""

import json
import logging
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from mmvmamba import ops
from mmvmamba.ops import BackendError, backend, backend_report, cross_scan, extension, selective_scan, use_backend
from tests.test_ops.scan_inputs import make_scan_inputs

STATUS = {status.name: status for status in backend_report()}


@pytest.fixture
def served(monkeypatch):
    """Function that makes one call and returns the name of the backend that served it."""
    names = []
    monkeypatch.setattr(backend, '_announce', lambda op, device, name, double: names.append(name))

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


def test_an_extension_for_another_torch_is_not_loaded_and_the_wheel_that_fits_is_named(monkeypatch, tmp_path):
    (tmp_path / '_C.so').write_text('')
    (tmp_path / '_build_info.json').write_text('{"torch": "1.13.1+cu117"}')
    monkeypatch.setattr(extension, 'FOLDER', tmp_path)
    reason = extension.load_extension.__wrapped__()
    assert f'was built for torch 1.13.1+cu117 and this is {torch.__version__}' in reason
    assert f'+{extension.wheel_tag()}, or rebuild it' in reason
    monkeypatch.setattr(torch, '__version__', '2.14.1')
    for cuda, tag in ((None, 'torch2.14cpu'), ('13.0', 'torch2.14cu130')):
        monkeypatch.setattr(torch.version, 'cuda', cuda)
        assert extension.wheel_tag() == tag


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Function that pretends that an extension with CUDA kernels, built as ``info`` says, meets a GPU."""

    def pretend(capability, kernels=True, **info):
        (tmp_path / '_build_info.json').write_text(json.dumps(info))
        monkeypatch.setattr(extension, 'FOLDER', tmp_path)
        monkeypatch.setattr(backend, 'load_extension', lambda: '')
        monkeypatch.setattr(backend, '_has_kernels', lambda device: kernels)
        monkeypatch.setattr(torch._C, '_dispatch_has_kernel_for_dispatch_key', lambda op, key: kernels)
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: capability)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'NVIDIA Imaginary')
        for function in (backend._status, backend._gpu_misfit, backend.has_kernel):
            function.cache_clear()
        return backend._status('cuda')

    yield pretend
    monkeypatch.undo()
    for function in (backend._status, backend._gpu_misfit, backend.has_kernel):
        function.cache_clear()


@pytest.mark.parametrize(
    'capability, arches, fits',
    [
        ((9, 0), ['9.0'], True),
        ((8, 9), ['8.0', '9.0'], True),
        ((8, 0), ['8.6', '9.0'], False),
        ((7, 5), ['8.0+PTX'], False),
        ((12, 1), ['8.0', '9.0'], False),
        ((12, 1), ['8.0', '9.0+PTX'], True),
        ((10, 3), ['9.0', '12.0+PTX'], False),
        ((9, 0), ['9.0a'], True),
        ((10, 3), ['10.0a', '9.0a+PTX'], False),
        ((10, 3), ['10.0f'], True),
        ((9, 0), [], True),
    ],
    ids=str,
)
def test_kernels_must_be_built_for_this_gpu(capability, arches, fits, gpu):
    status = gpu(capability, built='cuda', arches=arches)
    assert status.available == fits and backend.has_kernel('mlp', 'cuda') == fits
    if not fits:
        own = '{}.{}'.format(*capability)
        for words in (f'capability {", ".join(arches)}, and', f'Imaginary, has {own}', f"TORCH_CUDA_ARCH_LIST='{own}'"):
            assert words in status.reason


def test_auto_leaves_kernels_of_another_gpu(gpu, monkeypatch):
    gpu((7, 5), built='cuda', arches=['9.0'])
    monkeypatch.setitem(sys.modules, 'triton', None)
    with pytest.raises(BackendError, match=r"TORCH_CUDA_ARCH_LIST='7\.5'"):
        backend.resolve('selective_scan', 'cuda', training=True)
    with pytest.raises(BackendError, match=r"TORCH_CUDA_ARCH_LIST='7\.5'"):
        backend.resolve('selective_scan', 'cuda', 'cuda')


def test_a_build_of_unknown_arches_fits_and_so_does_a_gpu_that_can_not_be_asked(gpu, monkeypatch):
    assert gpu((9, 0), built='cuda', reason='nvcc').available

    def refuse():
        raise RuntimeError('Cannot re-initialize CUDA in forked subprocess')

    gpu((7, 5), built='cuda', arches=['9.0'])
    monkeypatch.setattr(torch.cuda, 'get_device_capability', refuse)
    backend._status.cache_clear()
    backend._gpu_misfit.cache_clear()
    assert backend._status('cuda').available


def test_a_failed_cuda_build_is_the_reason(gpu):
    status = gpu((9, 0), kernels=False, built='cpu', reason='the CUDA build failed: no space left')
    assert not status.available and 'without CUDA (the CUDA build failed: no space left)' in status.reason
    assert 'without CUDA (nvcc not found, or' in gpu((9, 0), kernels=False).reason


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


def test_a_backend_chosen_in_one_thread_stays_there():
    seen, ready, go = {}, threading.Barrier(2), threading.Barrier(2)

    def work(name):
        with use_backend(name):
            ready.wait(30)
            seen[name] = backend.resolve('selective_scan', 'cpu')
            go.wait(30)

    threads = [threading.Thread(target=work, args=(name,)) for name in ('cpu', 'naive')]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == dict(cpu='cpu', naive='naive') and backend.resolve('selective_scan', 'cpu') == 'cpu'


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
    message = rf'cross_scan: backend .{name}. (cannot run here: .*\w|takes cuda tensors, but the tensors are on cpu)'
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
    with pytest.raises(BackendError, match=r"'cpu' cannot run here: pretended"):
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
    [
        ({}, 'triton'),
        (dict(steps='short'), 'cuda'),
        (dict(training=True), 'cuda'),
        (dict(training=True, steps='long'), 'triton'),
        (dict(d_state=2), 'cuda'),
    ],
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


def test_float64_on_a_gpu_is_warned_of_once(monkeypatch, caplog, status):
    """Even if float32 went to naive before, by name."""
    status(cuda=True, triton=True)
    monkeypatch.setattr(backend, '_announced', set())
    assert backend.resolve('selective_scan', 'cuda', 'naive', training=True) == 'naive'
    caplog.clear()
    for _ in range(2):
        assert backend.resolve('selective_scan', 'cuda', training=True, double=True) == 'naive'
    (record,) = caplog.records
    assert record.levelname == 'WARNING' and 'naive backend' in record.message and 'no float64' in record.message


# ---- the fused layers -----------------------------------------------------------------------------------------------
LAYER_OPS = ('layer_norm', 'add_layer_norm', 'linear', 'mlp', 'depthwise_conv_silu', 'conv2d_channel_last')
CPU_LAYERS = tuple(op for op in LAYER_OPS if op != 'linear')  # that have a kernel there


@pytest.fixture
def takes(status, monkeypatch):
    """Function that tells whether a layer's kernel would serve a tensor on a machine that has all backends."""
    status(cuda=True, triton=True, cpu=True)
    monkeypatch.setattr(backend, 'has_kernel', lambda op, device: device == 'cuda' or op in CPU_LAYERS)
    monkeypatch.setattr(backend, '_TENSORS', (SimpleNamespace,))

    def call(op='layer_norm', name=None, fits=True, is_cuda=True):
        device = SimpleNamespace(type='cuda' if is_cuda else 'cpu')
        x = SimpleNamespace(is_cuda=is_cuda, device=device, dtype=torch.float32, shape=(2, 8))
        return backend.takes_kernel(op, name, lambda x: fits, x)

    return call


@pytest.mark.parametrize('op', LAYER_OPS)
def test_layers_follow_the_rule(op, takes, monkeypatch):
    assert takes(op) and takes(op, 'cuda') and takes(op, 'auto') and not takes(op, 'naive')
    on_cpu = op in CPU_LAYERS
    assert not takes(op, fits=False) and not takes(op, fits=False, is_cuda=False)
    assert takes(op, is_cuda=False) == takes(op, 'auto', is_cuda=False) == on_cpu
    assert not takes(op, 'naive', is_cuda=False)
    for name, kernel in (('naive', False), ('cuda', True), ('triton', False), ('cpu', False), ('auto', True)):
        with use_backend(name):
            assert takes(op) == kernel
            assert takes(op, 'cuda') and takes(op, is_cuda=False) == (on_cpu and name in ('cpu', 'auto'))
        monkeypatch.setenv('MMVMAMBA_BACKEND', name)
        assert takes(op) == kernel
    monkeypatch.setenv('MMVMAMBA_BACKEND', 'fast')
    with pytest.raises(ValueError, match="MMVMAMBA_BACKEND is 'fast'"):
        takes(op)


@pytest.mark.parametrize('op', LAYER_OPS)
def test_a_call_of_a_layer_that_names_what_can_not_serve_raises(op, takes):
    has = 'naive, cpu, cuda, auto' if op in CPU_LAYERS else 'naive, cuda, auto'
    for name in ('triton',) if op in CPU_LAYERS else ('triton', 'cpu'):
        with pytest.raises(BackendError, match=f"{op}: there is no backend '{name}', expected one of {has}"):
            takes(op, name)
    if op in CPU_LAYERS:
        with pytest.raises(BackendError, match=f'{op}: the cpu kernel does not take these arguments'):
            takes(op, 'cpu', fits=False, is_cuda=False)
        with pytest.raises(BackendError, match=f"{op}: backend 'cpu' takes cpu tensors, but the tensors are on cuda"):
            takes(op, 'cpu')
    with pytest.raises(BackendError, match=f'{op}: the cuda kernel does not take these arguments'):
        takes(op, 'cuda', fits=False)
    with pytest.raises(BackendError, match=f"{op}: backend 'cuda' takes cuda tensors, but the tensors are on cpu"):
        takes(op, 'cuda', is_cuda=False)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        takes(op, 'fast')


def test_layers_take_a_backend():
    """Each through its public function: naive serves, and what it lacks raises."""
    x, weight = torch.randn(1, 4, 4, 8), torch.randn(8)
    matrix, vector = torch.randn(8, 8), torch.randn(8)
    calls = dict(
        layer_norm=lambda **options: ops.layer_norm(x, weight, weight, **options),
        add_layer_norm=lambda **options: ops.add_layer_norm(x, x, weight, weight, **options)[1],
        linear=lambda **options: ops.linear(x, matrix, **options),
        mlp=lambda **options: ops.mlp(x, matrix, vector, matrix, vector, **options),
        depthwise_conv_silu=lambda **options: ops.depthwise_conv_silu(x, torch.ones(8, 1, 3, 3), **options),
        conv2d_channel_last=lambda **options: ops.conv2d_channel_last(x, torch.ones(4, 8, 1, 1), **options),
    )
    for op in LAYER_OPS:
        torch.testing.assert_close(calls[op](backend='naive'), calls[op]())
        with pytest.raises(BackendError, match=f"{op}: there is no backend 'triton'"):
            calls[op](backend='triton')


def test_a_backend_for_some_ops(served, takes):
    with use_backend('naive', ops=('layer_norm', 'cross_scan')):
        assert served() == 'naive' and not takes('layer_norm') and takes('mlp')
        with use_backend('naive', ops=('mlp',)):
            assert served() == 'naive' and not takes('layer_norm') and not takes('mlp')
        with use_backend('cuda'):
            assert takes('layer_norm')
    assert takes('layer_norm')
    with pytest.raises(ValueError, match="ops has 'norm', expected some of"), use_backend('naive', ops=('norm',)):
        pass
    with pytest.raises(ValueError, match="mlp: backend is 'triton', expected one of naive, cpu, cuda, auto"):
        use_backend('triton', ops=('mlp',)).__enter__()


def test_compiled_layers_follow_the_rule():
    """The choice is a constant of the graph."""

    def function(x, weight):
        return ops.layer_norm(x, weight, weight).sin() + ops.linear(x, weight.outer(weight))

    x, weight = torch.randn(2, 8), torch.randn(8)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend='eager')
    with use_backend('naive'):
        torch.testing.assert_close(compiled(x, weight), function(x, weight))


def test_environment_variable_of_a_process():
    """It is read at each call: a wrong one is no error of the import."""
    code = (
        'import os, torch; from mmvmamba.ops import backend, cross_scan\n'
        'try:\n'
        '    cross_scan(torch.ones(1, 1, 2, 2))\n'
        'except ValueError as error:\n'
        '    print(error)\n'
        'os.environ["MMVMAMBA_BACKEND"] = "naive"\n'
        'cross_scan(torch.ones(1, 1, 2, 2)); print(backend._announced)\n'
    )
    environment = {**os.environ, 'MMVMAMBA_BACKEND': 'nothing'}
    result = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    error, _, announced = result.stdout.partition('\n')
    assert "MMVMAMBA_BACKEND is 'nothing'" in error and "'naive'" in announced, result.stderr

"""Who watches each call of torch's gets torch's own layers, and what is repeated decides as it did at first."""

import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba.ops import backend, use_backend
from mmvmamba.ops.decisions import constant_when_compiled, decide, repeatable


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def takes(monkeypatch):
    """Function that tells whether the kernel of a layer would serve a tensor."""
    monkeypatch.setattr(backend, 'has_kernel', lambda op, device: True)
    monkeypatch.setattr(backend, '_check_can_run', lambda op, name, device_type: None)
    return lambda x, name=None: backend.takes_kernel('mlp', name, lambda x: True, x)


@pytest.mark.parametrize('watcher', [Mode, FunctionMode, FakeTensorMode, lambda: FlopCounterMode(display=False)])
def test_torchs_own_layers_serve_a_mode(watcher, takes):
    x = torch.ones(2, 8)
    with watcher():
        assert not takes(x) and takes(x, 'cpu')
    assert takes(x)


def test_torchs_own_layers_serve_a_class_of_tensors(takes):
    x = torch.ones(2, 8)
    assert not takes(x.as_subclass(Subclass))
    with torch.device('cpu'):  # a mode of torch's own, which changes no call
        assert takes(x) and takes(torch.nn.Parameter(x))


def test_what_is_repeated_decides_as_at_first():
    answers = iter(range(10))

    def run(key):
        return decide(key, next, answers), backend._requested.get()

    assert run('a') == (0, None) and run('a') == (1, None)
    with use_backend('naive', ['mlp']):
        function = repeatable(run)
        assert function('a') == (2, {'mlp': 'naive'})
    assert function('b') == (3, {'mlp': 'naive'}) and function('a') == (2, {'mlp': 'naive'})
    results: list = []
    thread = threading.Thread(target=lambda: results.append(function('b')))
    thread.start()
    thread.join()
    assert results == [(3, {'mlp': 'naive'})]
    assert run('b') == (4, None)


def test_what_is_repeated_may_hold_another():
    answers = iter(range(10))
    inner = repeatable(lambda: decide('key', next, answers))
    outer = repeatable(lambda: (decide('key', next, answers), inner(), decide('key', next, answers)))
    assert outer() == outer() == (0, 1, 0)


def test_an_error_ends_what_is_repeated():
    answers = iter(range(10))
    with pytest.raises(ZeroDivisionError):
        repeatable(lambda: decide('key', lambda: 1 / 0))()
    assert decide('key', next, answers) == 0 and decide('key', next, answers) == 1


def test_constants_are_marked_as_torch_marks_them():
    def function():
        return 0

    expected = dict(vars(torch.compiler.assume_constant_result(function)))
    function.__dict__.clear()
    assert dict(vars(constant_when_compiled(function))) == expected


def test_an_import_does_not_import_the_compiler():
    code = (
        'import sys, mmengine.runner; before = set(sys.modules); import mmvmamba; '  # mmengine may import it
        'print({"torch._dynamo", "torch._inductor"} & (set(sys.modules) - before))'
    )
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == 'set()\n'

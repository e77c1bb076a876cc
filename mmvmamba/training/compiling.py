"""Modules of a model that run compiled, and go on without if they cannot."""

import contextlib
import logging
from types import MethodType
from typing import Any, Optional

import torch
from mmengine.logging import print_log
from torch import nn

GRAPHED = ('reduce-overhead', 'max-autotune')  # modes that replay CUDA graphs


class CompiledForward:
    """Stands in for a module's ``forward``: compiled where that can be, else as it was.

    Parameters, buffers and their names stay as they are, and hooks of the module run around the compiled code.  A copy
    or pickle of the module has its own ``forward`` again.

    Args:
        module (nn.Module): The module.
        name (str): What to call it in the log.
        shapes (int, optional): How many shapes of inputs are compiled, each for itself; further ones, such as a last
            batch, run as they are. Default: None, any number.
        **options: Arguments of ``torch.compile``.
    """

    def __init__(self, module: nn.Module, name: str, shapes: Optional[int] = None, **options):
        self.module, self.name, self.shapes = module, name, shapes
        self.plain = _plain_forward(module)
        self.compiled = torch.compile(self.plain, **options)
        self.failed = self.paused = False
        self._seen: set = set()

    def __call__(self, *args, **kwargs):
        if self.failed or self.paused or torch.compiler.is_compiling() or not self._is_for(args, kwargs):
            return self.plain(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except _failures() as error:
            self.failed = True
            reason = ' '.join(str(error).split('\n')[:2]).strip()
            print_log(
                f'{self.name} cannot be compiled here and runs without: {type(error).__name__}: {reason:.300}',
                logger='current',
                level=logging.WARNING,
            )
            return self.plain(*args, **kwargs)

    def _is_for(self, args, kwargs) -> bool:
        if self.shapes is None:
            return True
        key = (self.module.training, torch.is_grad_enabled(), _shapes((args, kwargs)))
        if key in self._seen:
            return True
        if len(self._seen) >= self.shapes:
            return False
        self._seen.add(key)
        if len(self._seen) == self.shapes:
            print_log(f'{self.name} is compiled for {self.shapes} shapes; further ones run without', logger='current')
        return True

    def __reduce__(self):
        return _plain_forward, (self.module,)


def compile_modules(model: nn.Module, names, shapes: Optional[int] = None, **options) -> list:
    """Let some modules of a model run compiled.

    Args:
        model (nn.Module): The model.
        names (Sequence[str]): Names of its modules, such as ``backbone`` or ``roi_head.bbox_head``.
        shapes (int, optional): See :class:`CompiledForward`.
        **options: Arguments of ``torch.compile``.

    Returns:
        list[CompiledForward]: What stands in for the modules' ``forward``.

    Raises:
        ValueError: If the model has no such module.
    """
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise ValueError(f'modules are {list(names)}, but {type(model).__name__} has no {", ".join(missing)}')
    found = []
    for name in names:
        module: Any = modules[name]
        restore_modules([module])
        module.forward = CompiledForward(module, name, shapes, **options)
        found.append(module.forward)
    return found


def restore_modules(modules) -> None:
    """Give modules their own ``forward`` back.

    Args:
        modules (Iterable[nn.Module]): Modules; those that run as they are stay so.
    """
    for module in modules:
        if isinstance(module.__dict__.get('forward'), CompiledForward):
            del module.forward


@contextlib.contextmanager
def pause(model: nn.Module):
    """While it lasts, the model's compiled modules run as they are, so that hooks see what is inside them.

    Args:
        model (nn.Module): The model.
    """
    forwards: list = [module.__dict__.get('forward') for module in model.modules()]
    compiled = [forward for forward in forwards if isinstance(forward, CompiledForward)]
    for forward in compiled:
        forward.paused = True
    try:
        yield
    finally:
        for forward in compiled:
            forward.paused = False


def _plain_forward(module: nn.Module):
    return MethodType(type(module).forward, module)


def _shapes(value):
    """Shapes of the tensors in nested arguments, and what else they hold."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return tuple((key, _shapes(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_shapes, value))
    return repr(value)


def _failures() -> tuple:
    """What torch raises when it cannot compile; what a module raises by itself is another thing."""
    import torch._dynamo.exc as dynamo

    failures = [dynamo.TorchDynamoException]
    try:
        from torch._inductor.exc import InductorError

        failures.append(InductorError)
    except ImportError:  # before torch 2.6, wrapped by dynamo
        pass
    return tuple(failures)

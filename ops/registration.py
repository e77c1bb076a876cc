"""Registration of the ops with ``torch.library``: schemas, fake kernels, and all that Triton's ops have.

An op of the dispatcher library ``mmvmamba`` has its schema in the ``schema.inc`` of its room.  The compiled extension
defines the ops from that text, and registers kernels for CPU and CUDA, autograd (``csrc/common/autograd.h``) and
autocast.  :func:`define` adds fake kernels, and defines the ops where there is no extension, so that a schema exists
whether or not a backend can run.  :func:`define_triton` makes ops of their own for Triton's kernels from the same text.
"""

from pathlib import Path
from typing import Callable, Optional

import torch
from torch.autograd import forward_ad

from .backend import OP_BACKENDS
from .extension import defined_schema, load_extension, read_constants, read_schemas

load_extension()
CONSTANTS = read_constants()
IN_PYTHON: set = set()  # the ops whose kernels on some device are in Python, which a program in C++ cannot call
_library = torch.library.Library('mmvmamba', 'FRAGMENT')
_ADVICE = "backend='naive' has them, being plain PyTorch"


def define(room: str, backends: tuple, **fakes: Callable) -> None:
    """Define the ops of a room and their fake kernels.

    Args:
        room (str): Path of a file in the room, beside its ``schema.inc``.
        backends (tuple[str]): The backends that the room's ops have.
        fakes (Callable): The fake kernel of each op in ``schema.inc``.
    """
    for schema in read_schemas(Path(room).with_name('schema.inc')):
        op = schema.split('(')[0]
        if not op.endswith('_backward'):
            OP_BACKENDS[op] = backends
        if not defined_schema(op) and not _define(schema):
            continue
        torch.library.register_fake(f'mmvmamba::{op}', fakes[op], lib=_library)


def _define(schema: str) -> bool:
    """Define an op; False where kernels of an extension that does not fit stand in the way."""
    try:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    except RuntimeError:
        if not load_extension():
            raise
        return False
    return True


def define_kernels(key: str, **kernels: Callable) -> None:
    """Give ops that are defined kernels in Python, for a dispatch key such as ``CPU``."""
    for op, kernel in kernels.items():
        IN_PYTHON.add(op)
        _library.impl(op, kernel, key)


def check_absent(op: str, **arguments) -> None:
    """Refuse arguments that a schema foresees and the Triton kernels do not take yet."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f'{op}: {name} is not implemented yet, expected None')


# ---- ops of Triton's kernels ----------------------------------------------------------------------------------------
def define_triton(
    room: str,
    op: str,
    run: Callable,
    fake: Callable,
    differentiate: Callable,
    save: Callable,
    run_backward: Optional[Callable] = None,
    fake_backward: Optional[Callable] = None,
    autocast: Optional[Callable] = None,
) -> None:
    """Define ``mmvmamba::<op>_triton`` and its backward, with kernels, fakes, autograd and autocast.

    Args:
        room (str): Path of a file in the room, whose ``schema.inc`` has the schemas of ``op`` and its backward.
        op (str): Name of the op.
        run (Callable): The kernel, which imports Triton's room when it is called; on CPU by Triton's interpreter alone.
        fake (Callable): The fake kernel.
        differentiate (Callable): Gradients of the arguments from ``ctx`` and those of the results; may be shorter.
        save (Callable): Keeps in ``ctx`` what that reads, from the arguments and the results.
        run_backward (Callable, optional): The kernel of the backward op. Default: None, for an op that is linear in its
            first argument, and whose gradient is another such op.
        fake_backward (Callable, optional): The fake kernel of the backward op. Default: None.
        autocast (Callable, optional): Gives the arguments in the dtypes that the op wants under autocast.
            Default: None.
    """
    schemas = {schema.split('(')[0]: schema for schema in read_schemas(Path(room).with_name('schema.inc'))}
    name = f'{op}_triton'
    _define_kernel(schemas[op].replace(op, name, 1), run, fake)
    overload = getattr(torch.ops.mmvmamba, name).default
    call = _with_autograd(op, overload, differentiate, save)
    _library.impl(name, _linear(call) if run_backward is None else _without_tangents(op, call), 'Autograd')
    if run_backward is not None:
        backward = f'{op}_backward'
        _define_kernel(schemas[backward].replace(backward, f'{name}_backward', 1), run_backward, fake_backward)
        overload_backward = getattr(torch.ops.mmvmamba, f'{name}_backward').default
        refuse = _with_autograd(op, overload_backward, _refuse_second_derivatives(op), lambda *_: None)
        _library.impl(f'{name}_backward', _without_tangents(op, refuse), 'Autograd')
    if autocast is not None:
        for key in ('AutocastCPU', 'AutocastCUDA'):
            _library.impl(name, _with_autocast(overload, autocast), key)


def _define_kernel(schema: str, run: Callable, fake: Callable) -> None:
    name = schema.split('(')[0]
    IN_PYTHON.add(name)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ('CPU', 'CUDA'):
        _library.impl(name, run, key)
    torch.library.register_fake(f'mmvmamba::{name}', fake, lib=_library)


def _with_autograd(op: str, overload, differentiate: Callable, save: Callable) -> Callable:
    """The op with a node of autograd's graph where it needs one; as ``csrc/common/autograd.h`` does for the others."""

    def below(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            results = below(*arguments)
            ctx.set_materialize_grads(False)
            ctx.arguments = len(arguments)
            save(ctx, arguments, results)
            return results

        @staticmethod
        def backward(ctx, *grads):
            results = differentiate(ctx, *grads) if any(grad is not None for grad in grads) else ()
            return (*results, *(None,) * (ctx.arguments - len(results)))

    def call(*arguments):
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(arguments))):
            return below(*arguments)
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"{op}: torch.func's derivatives are not compiled; {_ADVICE}, and torch.autograd works"
            )
        return Node.apply(*arguments)

    return call


def _tensors(arguments: tuple) -> list:
    return [value for value in arguments if isinstance(value, torch.Tensor)]


def _without_tangents(op: str, call: Callable) -> Callable:
    def checked(*arguments):
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in _tensors(arguments)):
            raise NotImplementedError(f'{op}: forward-mode derivatives are not compiled; {_ADVICE}')
        return call(*arguments)

    return checked


def _linear(call: Callable) -> Callable:
    """An op that is linear in its first argument, its own forward-mode derivative."""

    def with_tangent(x, *arguments):
        primal, tangent = forward_ad.unpack_dual(x)
        if tangent is None:
            return call(x, *arguments)
        return forward_ad.make_dual(call(primal, *arguments), call(tangent, *arguments))

    return with_tangent


def _refuse_second_derivatives(op: str) -> Callable:
    def refuse(ctx, *_):
        raise NotImplementedError(f'{op}: second derivatives are not compiled; {_ADVICE}')

    return refuse


def _with_autocast(overload, autocast: Callable) -> Callable:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def call(*arguments):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*autocast(*arguments))

    return call

"""Packages of AOTInductor: a model compiled to machine code, which Python and C++ programs run with libtorch.

The scan and the fused layers stay calls of the ops in the compiled extension, a library that needs libtorch but no
Python: a program loads it before the package.
"""

import json
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Optional

import torch
from torch import nn

from mmvmamba.checkpoint.whole import commit, remove
from mmvmamba.layers import SS2D
from mmvmamba.ops import BackendError, backend_report, use_backend
from mmvmamba.ops.extension import FOLDER, load_extension
from mmvmamba.ops.registration import IN_PYTHON

from .graphs import Autocast
from .program import AXES, accepted_sizes, dynamic_sizes, export_program

OLDEST_TORCH = (2, 6)  # packages with metadata, and the loader for C++
PRECISIONS = dict(float32=None, float16=torch.float16, bfloat16=torch.bfloat16)
IMAGES = 'mmvmamba.images'  # the key of what a package says about the images it takes, for Package
# and of the same for C++: four numbers each, 0 in the second for no bound
LEAST, MOST = 'mmvmamba.least', 'mmvmamba.most'
_SCANS = ('selective_scan', 'cross_scan', 'cross_merge')  # Triton serves them on a GPU, which a program in C++ lacks


def op_library() -> Path:
    """The library with the ops that packages call; it needs libtorch, and no Python.

    A C++ program opens it by ``dlopen`` before it loads a package.

    Raises:
        RuntimeError: If the extension is not built, or does not fit the installed torch.
    """
    reason = load_extension()
    if reason:
        raise RuntimeError(f'a package needs the compiled ops, and they cannot be used: {reason}')
    return (sorted(FOLDER.glob('_C*.so')) + sorted(FOLDER.glob('_C*.pyd')))[0]


def check_can_package(device: torch.device) -> None:
    """Check that this machine can compile a package for a device.

    Raises:
        RuntimeError: If torch is too old, there is no C++ compiler, no GPU of that name, or no compiled op for it.
    """
    release = tuple(int(part) for part in torch.__version__.split('.')[:2])
    if release < OLDEST_TORCH:
        oldest = '.'.join(map(str, OLDEST_TORCH))
        raise RuntimeError(f'torch is {torch.__version__}, and packages of AOTInductor need torch {oldest} or newer')
    if device.type not in ('cpu', 'cuda'):
        raise RuntimeError(f'device is {str(device)!r}, expected cpu or cuda')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(f'device is {str(device)!r}, and torch sees {torch.cuda.device_count()} GPUs')
    op_library()
    status = next(status for status in backend_report() if status.name == device.type)
    if not status.available:
        raise RuntimeError(f'a package for {device.type} needs the compiled ops for it: {status.reason}')
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # of a class that other releases name differently
        raise RuntimeError(
            'AOTInductor needs a C++ compiler, and none works; install g++, or set CXX to another'
        ) from error


def to_package(
    module: nn.Module,
    example: torch.Tensor,
    path,
    *,
    dynamic: bool = True,
    freezing: bool = False,
    precision: str = 'float32',
    metadata: Optional[dict] = None,
) -> Path:
    """Compile any module that holds a VMamba to a package, for :func:`load_package` or a C++ program.

    The package has code for the processor (or GPU) of this machine, and fits the installed release of torch.

    Args:
        module (nn.Module): Maps images to a tensor or a tuple of them; in float32 and eval mode.
        example (Tensor): Images to trace it with, (B, C, H, W), on the device that the package is for. With
            ``dynamic`` H and W large enough that each map has sides of two pixels: for a VMamba 64.
        path (str | Path): The file, which ends in ``.pt2``; one of that name is replaced when the new one is whole.
        dynamic (bool): Whether batch, height and width may change; else they are those of ``example``. Default: True.
        freezing (bool): Whether weights become constants, laid out for the processor. Faster on a CPU; then they can't
            be replaced in the package. Default: False.
        precision (str): ``float32``, or ``float16`` or ``bfloat16`` for the module under autocast, with float32 images
            and results. Default: ``float32``.
        metadata (dict, optional): Texts to keep in the package. Default: none.

    Returns:
        Path: The file.

    Raises:
        TypeError: If ``module`` or ``example`` is of another type, or ``metadata`` has anything but texts.
        ValueError: If ``module`` trains, is not in float32 on the device of ``example``, carries a state between
            calls, or fixes a size that was to be dynamic; or if ``path`` or ``precision`` is another.
        RuntimeError: If this machine can't compile a package for that device, see :func:`check_can_package`.
    """
    _check_arguments(module, example, precision, metadata)
    path = Path(path)
    if path.suffix != '.pt2':
        raise ValueError(f'path is {str(path)!r}, expected a name that ends in .pt2')
    device = example.device
    check_can_package(device)
    dtype = PRECISIONS[precision]
    if dtype is not None:
        graph: nn.Module = Autocast(module, device.type, dtype).eval()
    else:  # a traced module has a graph of its own
        graph = nn.Sequential(module).eval() if hasattr(module, 'graph') else module
    with _ops_of_cpp(device):
        program = export_program(graph, example, dynamic)
    sizes = dynamic_sizes(program) if dynamic else accepted_sizes(program)
    facts = dict(
        sizes=dict(zip(AXES, sizes)),
        dtype=str(example.dtype).rpartition('.')[2],
        device=device.type,
        torch=torch.__version__,
        python_ops=find_python_ops(program),
    )
    partial = path.with_name(f'{path.stem}.partial.pt2')
    try:
        own = {IMAGES: json.dumps(facts)}
        own[LEAST], own[MOST] = (' '.join(str(bound or 0) for bound in bounds) for bounds in zip(*sizes))
        _compile(program, partial, freezing, {**(metadata or {}), **own})
        commit(str(partial), str(path))
    finally:
        remove(str(partial))
    return path


def _check_arguments(module, example, precision, metadata) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f'module is a {type(module).__name__}, expected a torch.nn.Module')
    if not isinstance(example, torch.Tensor) or example.dim() != 4 or example.dtype != torch.float32:
        found = (example.dtype, tuple(example.shape)) if isinstance(example, torch.Tensor) else type(example).__name__
        raise TypeError(f'example is {found}, expected float32 images (B, C, H, W)')
    if precision not in PRECISIONS:
        raise ValueError(f'precision is {precision!r}, expected one of {", ".join(PRECISIONS)}')
    for key, text in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f'metadata has {key!r}: {text!r}, expected texts')
    if module.training:
        raise ValueError('module is in training mode, expected module.eval()')
    for value in module.parameters():
        if value.dtype != torch.float32 or value.device != example.device:
            raise ValueError(
                f'module has parameters in {value.dtype} on {value.device}, expected float32 on {example.device}, '
                'the device of example'
            )
    if any(part.options.with_initial_state for part in module.modules() if isinstance(part, SS2D)):
        raise ValueError('with_initial_state is True, expected False: a package carries no state between calls')


@contextmanager
def _ops_of_cpp(device: torch.device) -> Iterator[None]:
    """On a GPU the kernels in C++ in place of Triton's, whose ops only Python knows."""
    if device.type == 'cpu':
        yield
        return
    try:
        with use_backend('cuda', _SCANS):
            yield
    except BackendError as error:
        raise RuntimeError(f'a package for {device} needs the compiled ops for it: {error}') from error


def find_python_ops(program: torch.export.ExportedProgram) -> list:
    """The ops of a program that have no kernel in C++; a package that calls one runs from Python alone."""
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.nodes if node.op == 'call_function'}
    names = {str(target._schema.name) for target in targets if isinstance(target, torch._ops.OpOverload)}
    return sorted(names & {f'mmvmamba::{op}' for op in IN_PYTHON})


def _compile(program: torch.export.ExportedProgram, path: Path, freezing: bool, metadata: dict) -> None:
    from torch._inductor import aoti_compile_and_package, config

    options = {'freezing': freezing, 'aot_inductor.metadata': dict(metadata)}
    if hasattr(config.aot_inductor, 'check_lowerbound'):
        options['aot_inductor.check_lowerbound'] = False  # which asks for a batch of 2, whatever the program says
    with torch.no_grad(), warnings.catch_warnings():  # freezing asks for no_grad
        warnings.simplefilter('ignore')  # of torch's own internals
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)

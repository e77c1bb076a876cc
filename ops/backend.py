"""Which op backends exist on this machine, which one a call gets, and why.

A call is served by the backend named in the call, else by the innermost :func:`use_backend`, else by the environment
variable ``MMVMAMBA_BACKEND``, else (``auto``) by the fastest one that can run on the tensor's device.  A backend that
was named and can't run raises :class:`BackendError`; only ``auto`` may choose.

``auto`` never trains on ``naive`` on a GPU, but raises.  Two exceptions remain, of which the log warns once: float64,
which the GPU's scans don't have, goes to ``naive``, the reference; and tensors on CPU, whatever GPU there is, go to
``naive`` if the ``cpu`` backend is missing.

The fused layers (norms, linear, MLP, convolutions) have ``naive``, torch's own layers on every device, ``cuda`` and,
but for ``linear``, ``cpu``.  For them a choice made for all ops that they lack, or that their kernels can't serve,
means torch's layers; only a call's own ``backend`` raises.  ``auto`` takes the kernels where they can serve, and where
they gain.  ``ssd_scan`` has no ``cuda``: a choice of it for all ops means ``auto`` there.
"""

import logging
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Callable, Iterator, Optional, Sequence

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .decisions import constant_when_compiled, decide
from .decisions import requested as _requested
from .extension import REBUILD, build_info, load_extension

BACKENDS = ('naive', 'cpu', 'triton', 'cuda')
ENV_VARIABLE = 'MMVMAMBA_BACKEND'
SHORT = 128  # steps, between the 49 where cuda scans faster than triton and the 196 where it does not
LONG = 16384  # steps, between the 3136 where cuda trains faster than triton and the 67200 where it does not
_DEVICES = {'naive': ('any',), 'cpu': ('cpu',), 'triton': ('cuda',), 'cuda': ('cuda',)}

_TENSORS = (torch.Tensor, torch.nn.Parameter)

OP_BACKENDS: dict = {}  # op: the backends it has, filled by its room's registration

logger = logging.getLogger('mmvmamba.ops')
# what os.environ keeps: asking itself raises and catches an error where there is no value, 2 us at each call of an op
_environment = getattr(os.environ, '_data', os.environ)
_ENV_KEY = os.environ.encodekey(ENV_VARIABLE) if _environment is not os.environ else ENV_VARIABLE
_announced: set = set()


class BackendError(RuntimeError):
    """An op backend was asked for that cannot run here."""


@dataclass(frozen=True)
class BackendStatus:
    """State of one backend on this machine.

    Attributes:
        name (str): ``naive``, ``cpu``, ``triton`` or ``cuda``.
        available (bool): Whether it can run here.
        reason (str): Why it can, or why not and what would help.
        devices (tuple[str]): Device types whose tensors it takes.
    """

    name: str
    available: bool
    reason: str
    devices: tuple


@cache
def has_kernel(op: str, device_type: str) -> bool:
    """Whether the compiled extension is there and has a kernel for ``mmvmamba::<op>`` that runs on this machine.

    Args:
        op (str): Public name of the op.
        device_type (str): ``cpu`` or ``cuda``; there is none for others.
    """
    return (
        device_type in ('cpu', 'cuda')
        and not load_extension()
        and torch._C._dispatch_has_kernel_for_dispatch_key(f'mmvmamba::{op}', device_type.upper())
        and (device_type == 'cpu' or not _gpu_misfit())
    )


def _has_kernels(device: str) -> bool:
    return not load_extension() and torch._C._dispatch_has_kernel_for_dispatch_key(
        'mmvmamba::selective_scan', device.upper()
    )


@cache
def _gpu_misfit() -> str:
    """Why the CUDA kernels can't run on the GPU that is current when this is first asked; empty if they can."""
    arches = build_info().get('arches')
    if not arches or not torch.cuda.is_available():
        return ''
    try:
        capability = torch.cuda.get_device_capability()
    except RuntimeError:  # a forked process can't ask
        return ''
    if any(_runs_on(capability, arch) for arch in arches):
        return ''
    own = '{}.{}'.format(*capability)
    return (
        f'the extension was built for GPUs of compute capability {", ".join(arches)}, and this one, '
        f'{torch.cuda.get_device_name()}, has {own}; rebuild it with: '
        f"TORCH_CUDA_ARCH_LIST='{own}' {REBUILD}"
    )


def _runs_on(capability: tuple, arch: str) -> bool:
    """Whether code for ``arch``, such as ``9.0+PTX``, runs on a GPU."""
    major, minor, kind, ptx = re.findall(r'^(\d+)\.(\d)([af]?)(\+PTX)?$', arch)[0]
    built = (int(major), int(minor))
    if kind == 'a':  # for one GPU alone
        return built == capability
    return built <= capability and (built[0] == capability[0] or (ptx and not kind))


def _cuda_status() -> tuple:
    """Whether the CUDA backend can run on a machine with a GPU, and why."""
    if load_extension():
        return False, load_extension()
    if not _has_kernels('cuda'):
        info = build_info()
        reason = info.get('reason') if info.get('built') == 'cpu' else ''
        return False, f'the extension was built without CUDA ({reason or "nvcc not found, or MMVMAMBA_BUILD=cpu"})'
    return not _gpu_misfit(), _gpu_misfit() or 'compiled CUDA C++'


@cache
def _status(name: str) -> BackendStatus:
    available, reason = True, ''
    if name == 'naive':
        reason = 'pure PyTorch, always there; a Python loop over time, for reference and small inputs'
    elif name == 'cpu':
        available = _has_kernels('cpu')
        reason = 'compiled C++' if available else load_extension() or 'the extension was built without the CPU kernels'
    elif not torch.cuda.is_available():
        available, reason = False, 'no CUDA GPU is visible to torch'
    elif name == 'cuda':
        available, reason = _cuda_status()
    else:
        try:
            import triton

            reason = f'triton {triton.__version__}'
        except ImportError as error:
            available, reason = False, f'triton cannot be imported ({error})'
    return BackendStatus(name, available, reason, _DEVICES[name])


def backend_report() -> list:
    """List every backend with its state on this machine.

    Returns:
        list[BackendStatus]: One entry each for naive, cpu, triton and cuda, with the reason why it can or can't run.
    """
    return [_status(name) for name in BACKENDS]


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS + ('auto',):
        raise ValueError(f'{source} is {name!r}, expected one of {", ".join(BACKENDS + ("auto",))}')
    return name


@contextmanager
def use_backend(name: str, ops: Optional[Sequence[str]] = None) -> Iterator[None]:
    """Serve every op call inside the ``with`` block by one backend.

    Args:
        name (str): ``naive``, ``cpu``, ``triton``, ``cuda`` or ``auto``.
        ops (Sequence[str], optional): Public names of the ops that this is for, such as ``('layer_norm', 'mlp')``; the
            others go on as outside. Default: all.

    Raises:
        ValueError: If ``name`` is not a backend, or one of ``ops`` is no op or lacks the backend.
        BackendError: If the backend cannot run on this machine.

    Note:
        ``torch.compile`` fixes the backend when it traces: enter the block before the first compiled call.
    """
    _check_name(name, 'backend')
    for op in ops or ():
        if op not in OP_BACKENDS:
            raise ValueError(f'ops has {op!r}, expected some of {", ".join(OP_BACKENDS)}')
        if name != 'auto' and name not in OP_BACKENDS[op]:
            raise ValueError(f'{op}: backend is {name!r}, expected one of {", ".join(OP_BACKENDS[op])}, auto')
    if name != 'auto' and not _status(name).available:
        raise BackendError(f'backend {name!r} cannot run here: {_status(name).reason}')
    chosen = {None: name} if ops is None else {**(_requested.get() or {}), **dict.fromkeys(ops, name)}
    token = _requested.set(chosen)
    try:
        yield
    finally:
        _requested.reset(token)


def _requested_for(op: str) -> str:
    """The backend that :func:`use_backend` or the environment asks for; ``auto`` if neither does."""
    chosen = _requested.get()
    if chosen is not None:
        name = chosen.get(op) or chosen.get(None)
        if name is not None:
            return name
    if _ENV_KEY not in _environment:
        return 'auto'
    return _check_name(os.environ[ENV_VARIABLE] or 'auto', f'environment variable {ENV_VARIABLE}')


def _check_can_run(op: str, name: str, device_type: str) -> None:
    status = _status(name)
    if not status.available:
        raise BackendError(f'{op}: backend {name!r} cannot run here: {status.reason}')
    if 'any' not in status.devices and device_type not in status.devices:
        raise BackendError(
            f'{op}: backend {name!r} takes {"/".join(status.devices)} tensors, but the tensors are on {device_type}'
        )


def takes_kernel(op: str, name: Optional[str], fits: Callable, x: torch.Tensor, *others) -> bool:
    """Whether the kernel of a fused layer for the device of ``x`` serves a call, or torch's own layers.

    Torch's own serve where somebody watches each call of torch's, unless the call itself names a kernel.

    Args:
        op (str): Public name of the op.
        name (str, optional): The call's own ``backend`` argument.
        fits (Callable): Tells from ``x`` and ``others`` whether the kernel takes them.
        x (Tensor): The input.
        *others: More for ``fits``.

    Raises:
        ValueError: If a name is no backend.
        BackendError: If the call's own backend can't serve it.
    """
    device = x.device.type
    if name is None:
        return _wants_kernel(op, device) and not is_watched(x) and fits(x, *others)
    if not _names_kernel(op, name, device):
        return False
    if fits(x, *others):
        return True
    if name != 'auto':
        raise BackendError(f'{op}: the {name} kernel does not take these arguments; x is {x.dtype}, {tuple(x.shape)}')
    return False


def is_watched(x: torch.Tensor) -> bool:
    """Whether somebody gets, and may replace, each call of torch's, which would miss those inside a kernel.

    That is a mode, such as a counter of FLOPs, or a tensor of a class of its own.

    Args:
        x (Tensor): The input of a layer.
    """
    return decide('watched', _is_watched, x)


def _is_watched(x: torch.Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    if type(x) not in _TENSORS or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._len_torch_function_stack() == 0:
        return False
    # a default device is a mode too
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


@constant_when_compiled
def _wants_kernel(op: str, device_type: str) -> bool:
    return _requested_for(op) in ('auto', device_type) and has_kernel(op, device_type)


@constant_when_compiled
def _names_kernel(op: str, name: str, device_type: str) -> bool:
    if _check_name(name, 'backend') == 'auto':
        return has_kernel(op, device_type)
    if name not in OP_BACKENDS[op]:
        raise BackendError(f'{op}: there is no backend {name!r}, expected one of {", ".join(OP_BACKENDS[op])}, auto')
    _check_can_run(op, name, device_type)
    return name != 'naive'


@constant_when_compiled
def resolve(
    op: str,
    device_type: str,
    name: Optional[str] = None,
    training: bool = False,
    d_state: int = 1,
    double: bool = False,
    steps: str = 'medium',
) -> str:
    """Choose the backend for one call.

    Args:
        op (str): Public name of the op, for messages and the rule of ``auto``.
        device_type (str): Device type of the call's tensors.
        name (str, optional): The call's own ``backend`` argument.
        training (bool): Whether gradients will be needed.
        d_state (int): State size N, for the rule of ``auto``; any number above 1 means all of them.
        double (bool): Whether the op's arithmetic is in float64, which the GPU kernels don't have: ``auto`` then takes
            ``naive``, the reference. Default: False.
        steps (str): How long sequences are, by :func:`classify_length`, for the rule of ``auto``. Default: ``medium``.

    Returns:
        str: A backend that runs on this device.

    Raises:
        ValueError: If a name is no backend.
        BackendError: If a named backend can't serve this device, or training on a GPU would fall to ``naive``.
    """
    chosen = _requested_for(op) if name is None else _check_name(name, 'backend')
    has = OP_BACKENDS.get(op, BACKENDS)
    if name is None and chosen not in (*has, 'auto'):  # a choice for all ops, of which this one lacks it
        _check_can_run(op, chosen, device_type)
        chosen = 'auto'
    if chosen == 'auto':
        chosen = 'naive' if double and device_type != 'cpu' else _choose(op, device_type, training, d_state, steps)
    else:
        if chosen not in has:
            raise BackendError(f'{op}: there is no backend {chosen!r}, expected one of {", ".join(has)}, auto')
        _check_can_run(op, chosen, device_type)
        if double and chosen in ('cuda', 'triton'):
            raise BackendError(f'{op}: backend {chosen!r} takes float32, float16 and bfloat16, got float64')
    _announce(op, device_type, chosen, double)
    return chosen


def _choose(op: str, device_type: str, training: bool, d_state: int, steps: str) -> str:
    for name in _preference(op, device_type, training, d_state, steps):
        if name in OP_BACKENDS.get(op, BACKENDS) and _status(name).available:
            return name
    if device_type == 'cuda' and training:
        raise BackendError(
            f'{op}: neither compiled backend can run on this GPU (cuda: {_status("cuda").reason}; '
            f'triton: {_status("triton").reason}), and training on the Python loop would be silently '
            f"slow. Install triton, rebuild the extension, or ask for backend='naive' by name"
        )
    return 'naive'


def classify_length(length: int) -> str:
    """``short``, ``medium`` or ``long``: all that the rule of ``auto`` asks of the number of steps."""
    return 'short' if length < SHORT else 'long' if length >= LONG else 'medium'


def _preference(op: str, device_type: str, training: bool, d_state: int, steps: str) -> tuple:
    """The rule of ``auto``: compiled backends for a device, the faster first.

    Milliseconds on an H200, float16 in, float32 out (tools/benchmark/ops.py, one run):

    =======================================  ============  ============
    selective_scan, (batch, dim, L), N       cuda          triton
    =======================================  ============  ============
    (128, 384, 3136), 1, forward + backward  0.48 + 1.12   0.43 + 1.55
    (128, 768, 784), 1, forward              0.28          0.24
    (128, 1536, 196), 1, forward             0.21          0.18
    (128, 3072, 49), 1, forward              0.105         0.127
    (2, 384, 67200), 1, forward              0.46          0.32
    (32, 384, 3136), 16, forward             0.96          2.06
    cross_scan + cross_merge, (128, 96, 56, 56)
    float16, channel-first                   0.13 + 0.14   0.71 + 0.22
    float16, channel-last                    0.11 + 0.10   0.12 + 0.12
    on an H100, forward + backward, N = 1
    (128, 384, 3136)                         0.56 + 1.21   0.52 + 1.68
    (128, 768, 784)                          0.33 + 0.76   0.28 + 1.06
    (128, 1536, 196)                         0.20 + 0.56   0.22 + 1.31
    (128, 3072, 49)                          0.10 + 0.39   0.14 + 0.80
    (2, 384, 67200)                          0.51 + 1.28   0.37 + 1.09
    =======================================  ============  ============
    """
    if device_type == 'cpu':
        return ('cpu',)
    if device_type == 'cuda':
        one_state = op == 'selective_scan' and d_state == 1
        triton_first = one_state and (steps == 'long' if training else steps != 'short')
        return ('triton', 'cuda') if triton_first else ('cuda', 'triton')
    return ()


def _announce(op: str, device_type: str, name: str, double: bool) -> None:
    no_kernel = double and device_type == 'cuda'
    if (op, device_type, name, no_kernel) in _announced:
        return
    _announced.add((op, device_type, name, no_kernel))
    if name == 'naive':
        others = f'cpu: {_status("cpu").reason}; cuda: {_status("cuda").reason}'
        reason = 'the GPU backends have no float64' if no_kernel else others
        logger.warning(f'{op} on {device_type} runs on the naive backend, a slow Python loop ({reason})')
    else:
        logger.info(f'{op} on {device_type} runs on the {name} backend')

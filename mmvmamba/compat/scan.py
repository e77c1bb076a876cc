"""Forward and backward of the selective scan beside autograd: what ``fwd`` and ``bwd`` call."""

import functools
import logging

import torch

from mmvmamba.ops.backend import classify_length, resolve
from mmvmamba.ops.checks import (
    check_float,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_state_dtype,
    check_tensor,
)
from mmvmamba.ops.selective_scan import forms, naive
from mmvmamba.ops.selective_scan.arguments import check_shapes, check_tensors
from mmvmamba.ops.selective_scan.registration import num_states

from .carries import check as check_x
from .carries import pack, unpack

OP = 'selective_scan'

logger = logging.getLogger('mmvmamba.compat')


def forward(name, u, delta, A, B, C, D, delta_bias, delta_softplus, float_output, z=None) -> list:
    """Scan without a record of autograd's.

    Args:
        name (str): The provided module, for errors.
        u (Tensor): (batch, dim, L).
        delta (Tensor): (batch, dim, L), or (batch, dim / r, L).
        A (Tensor): (dim, N), float32.
        B (Tensor): (batch, K, N, L), (batch, N, L) or (dim, N).
        C (Tensor): In one of the forms of B.
        D (Tensor, optional): (dim,), float32.
        delta_bias (Tensor, optional): (dim,), float32.
        delta_softplus (bool): Whether to apply softplus to ``delta`` after the bias.
        float_output (bool): Whether the output is float32, rather than in the dtype of ``u``.
        z (Tensor, optional): Gate, (batch, dim, L). Default: None.

    Returns:
        list[Tensor]: ``out`` (batch, dim, L) and ``x``, see :mod:`mmvmamba.compat.carries`; with a gate also the gated
        output.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape or a device is wrong.
        NotImplementedError: If A is complex.
    """
    if not torch.is_grad_enabled():
        return _forward(name, u, delta, A, B, C, D, delta_bias, delta_softplus, float_output, z)
    if torch.compiler.is_compiling():
        with torch.no_grad():
            return _forward(name, u, delta, A, B, C, D, delta_bias, delta_softplus, float_output, z)
    torch._C._set_grad_enabled(False)  # as no_grad does, at a quarter of its cost
    try:
        return _forward(name, u, delta, A, B, C, D, delta_bias, delta_softplus, float_output, z)
    finally:
        torch._C._set_grad_enabled(True)


def _forward(name, u, delta, A, B, C, D, delta_bias, delta_softplus, float_output, z) -> list:
    given = u
    u, delta, B, C = as_kernels_take(name, u, delta, A, B, C, D, delta_bias)
    dtype = output_dtype(given, float_output)
    if z is None:
        out, states = run(u, delta, A, B, C, D, delta_bias, delta_softplus, float_output)
        return [out if out.dtype == dtype else out.to(dtype), pack(states, u.shape[2])]
    check_gate(name, z, u)
    out, states = run(u, delta, A, B, C, D, delta_bias, delta_softplus, True)
    return [out.to(dtype), pack(states, u.shape[2]), forms.gate(out, z, dtype)]


def backward(name, dout, u, delta, A, B, C, D, delta_bias, x, delta_softplus) -> list:
    """Gradients of :func:`forward` without z, by the op's own backward.

    Args:
        name (str): The provided module, for errors.
        dout (Tensor): Gradient of ``out``, (batch, dim, L), in its dtype or that of ``u``.
        x (Tensor, optional): What forward returned; None computes it again.
        others: As in :func:`forward`.

    Returns:
        list[Tensor | None]: Gradients of ``u``, ``delta``, A, B, C, D and ``delta_bias``, each in the form and dtype of
        its argument; None for D and ``delta_bias`` that are not given.
    """
    given = u, delta, B, C
    u, delta, B, C = as_kernels_take(name, u, delta, A, B, C, D, delta_bias)
    dout = check_gradient(name, dout, u, u.shape)
    states = carries(name, x, u, A)
    grads = run_backward(dout, u, delta, A, B, C, D, delta_bias, states, delta_softplus)
    du, ddelta, dA, dB, dC, dD, dbias = grads
    du, ddelta, dB, dC = map(in_form_of, (du, ddelta, dB, dC), given, ('u', 'delta', 'B', 'C'))
    return [du, ddelta, dA, dB, dC, None if D is None else dD, None if delta_bias is None else dbias]


def gate_backward(name, dout, z, out, dz, recompute_out_z) -> tuple:
    """Backward of the gate: gradient of ``out``, of z (written into ``dz`` if that is given), and ``out * silu(z)``."""
    if out is None:
        raise ValueError(f'{name}: out is None, expected what fwd returned, since z is given')
    for key, value in dict(dout=dout, out=out, dz=dz).items():
        if value is not None or key != 'dz':
            check_float(name, key, value, 'batch, dim, L')
            check_shape(name, key, value, z.shape, 'the shape of z')
    check_same_device(name, 'z', dict(z=z, dout=dout, out=out, dz=dz))
    wide = torch.promote_types(z.dtype, torch.float32)
    gradient, z_, y = dout.to(wide), z.to(wide), out.to(wide)
    sigmoid = torch.sigmoid(z_)
    silu = z_ * sigmoid
    slope = gradient * y * sigmoid * (1 + z_ - silu)
    if dz is None:
        dz = slope.to(z.dtype)
    else:
        dz.copy_(slope)
    return gradient * silu, dz, (y * silu).to(out.dtype) if recompute_out_z else None


def run(u, delta, A, B, C, D, delta_bias, delta_softplus, float_output) -> tuple:
    """The op on the backend of the moment; arguments in the form that kernels take.

    Returns:
        tuple[Tensor, Tensor]: Output, and the states (batch, dim, saved, N): of ``naive``, which saves none on the way,
        zeros and the last.
    """
    backend = _backend(u, A)
    if backend == 'naive':
        dtype = output_dtype(u, float_output)
        out, last = naive.selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, dtype)
        return out, torch.stack((torch.zeros_like(last), last), dim=2)
    op = torch.ops.mmvmamba.selective_scan_triton if backend == 'triton' else torch.ops.mmvmamba.selective_scan
    float_output = bool(float_output) and u.dtype != torch.float64
    return op(u, delta, A, B, C, D, delta_bias, bool(delta_softplus), float_output)


def carries(name, x, u, A):
    """The states in ``x`` that the backend of the moment saved on the way; None if there are none."""
    if x is None:
        return None
    backend = _backend(u, A)
    saved = num_states(u.shape[2], u.device.type, backend == 'triton')
    if not torch.compiler.is_compiling():
        check_x(name, x, u, A.shape[1], saved)
    return unpack(x, saved) if backend != 'naive' and x.dtype == A.dtype else None


def run_backward(dout, u, delta, A, B, C, D, delta_bias, states, delta_softplus) -> tuple:
    """The op's backward on the backend of the moment; without ``states`` they are computed again."""
    backend = _backend(u, A)
    if backend == 'naive':
        return naive.selective_scan_backward(dout, u, delta, A, B, C, D, delta_bias, delta_softplus)
    if states is None:
        _announce_second_forward()
        with torch.no_grad():
            _, states = run(u, delta, A, B, C, D, delta_bias, delta_softplus, False)
    ops = torch.ops.mmvmamba
    op = ops.selective_scan_triton_backward if backend == 'triton' else ops.selective_scan_backward
    return op(dout, u, delta, A, B, C, D, delta_bias, states, bool(delta_softplus))


def _backend(u, A) -> str:
    # as in the public op: a traced program must not depend on L
    steps = 'medium' if torch.compiler.is_compiling() else classify_length(u.shape[2])
    return resolve(OP, u.device.type, None, True, 1 if A.shape[1] == 1 else 2, u.dtype == torch.float64, steps)


@functools.cache
def _announce_second_forward() -> None:
    logger.info('a backward was given a copy of x, which has no carries: it scans forward once more to get them')


def output_dtype(u, float_output) -> torch.dtype:
    """float32 if that is asked for, unless ``u`` is float64; else the dtype of ``u``."""
    return torch.float32 if float_output and u.dtype != torch.float64 else u.dtype


# ---- arguments ------------------------------------------------------------------------------------------------------
def as_kernels_take(name, u, delta, A, B, C, D, delta_bias) -> tuple:
    """``u``, ``delta``, B and C in the form that kernels take.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape or a device is wrong.
        NotImplementedError: If A is complex.
    """
    try:
        if _is_plain(u, delta, A, B, C, D, delta_bias):
            return u, delta, B, C
    except AttributeError:  # something is no tensor, of which the checks below say the name
        pass
    if isinstance(A, torch.Tensor) and A.is_complex():
        raise NotImplementedError(
            f'{name}: A is complex, and the scan is for real A; take real A, as the layers of mamba_ssm do, or install '
            'the original'
        )
    check_tensors(name, u, delta, A, B, C, D, delta_bias)
    if C is None:  # which the public op takes
        check_tensor(name, 'C', C, 'batch, groups, N, L')
    tensors = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
    check_same_device(name, 'u', tensors)
    moving = {key: tensors[key] for key in ('u', 'delta', 'B', 'C') if tensors[key].dim() != 2}
    check_same_dtype(name, 'u', moving, 'they must agree')
    check_state_dtype(name, u, {key: t for key, t in tensors.items() if key not in moving})
    check_shapes(name, u, delta, A, B, C, D, delta_bias)
    if len(moving) < 4:  # weights that are constant over time keep their digits
        u, delta, B, C = (t.to(A.dtype) for t in (u, delta, B, C))
    B, C = forms.per_group(B, C, u)
    return u, forms.per_channel(delta, u), B, C


def _is_plain(u, delta, A, B, C, D, delta_bias) -> bool:
    """Whether all is in the form that kernels take, and agrees."""
    shape, shape_B = u.shape, B.shape
    if len(shape) != 3 or len(shape_B) != 4 or C is None:
        return False
    batch, dim, length = shape
    dtype, device = u.dtype, u.device
    state = torch.float64 if dtype is torch.float64 else torch.float32
    return (
        delta.shape == shape
        and C.shape == shape_B
        and shape_B[0] == batch
        and shape_B[3] == length
        and A.shape == (dim, shape_B[2])
        and dim % shape_B[1] == 0
        and shape_B[2] <= 256
        and 0 not in shape
        and shape_B[2] != 0
        and dtype.is_floating_point
        and delta.dtype is B.dtype is C.dtype is dtype
        and A.dtype is state
        and device == delta.device == A.device == B.device == C.device
        and (D is None or (D.dtype is state and D.shape == (dim,) and D.device == device))
        and (
            delta_bias is None
            or (delta_bias.dtype is state and delta_bias.shape == (dim,) and delta_bias.device == device)
        )
    )


def check_gate(name, z, u) -> None:
    """Check z beside ``u``."""
    check_tensor(name, 'z', z, 'batch, dim, L')
    check_shape(name, 'z', z, u.shape, 'the shape of u')
    check_same_device(name, 'u', dict(u=u, z=z))


def check_gradient(name, dout, u, shape) -> torch.Tensor:
    """Check the gradient of an output of a shape; in a dtype that kernels take."""
    taken = (u.dtype, torch.float32)
    # all that a compiled backward may ask
    if isinstance(dout, torch.Tensor) and dout.shape == shape and dout.dtype in taken and dout.device == u.device:
        return dout
    check_float(name, 'dout', dout, ', '.join(map(str, shape)))
    check_shape(name, 'dout', dout, shape, 'the shape of what fwd returned')
    check_same_device(name, 'u', dict(u=u, dout=dout))
    return dout.to(u.dtype)


def in_form_of(gradient: torch.Tensor, tensor: torch.Tensor, name: str) -> torch.Tensor:
    """A gradient in form and dtype of its argument: (batch, dim, L) of u and delta, (batch, K, N, L) of B and C."""
    if name in ('B', 'C') and tensor.dim() == 2:
        gradient = gradient.sum((0, 3))
    else:
        rows = 1 if name in ('B', 'C') and tensor.dim() == 3 else tensor.shape[1]
        if gradient.shape[1] != rows:
            gradient = gradient.unflatten(1, (rows, -1)).sum(2)
        if gradient.dim() != tensor.dim():
            gradient = gradient.squeeze(1)
    return gradient if gradient.dtype == tensor.dtype else gradient.to(tensor.dtype)

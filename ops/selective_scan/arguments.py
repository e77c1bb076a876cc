"""Checks of the arguments of a selective scan, in all their forms."""

import torch

from ..checks import MAX_STATE, check_shape, check_tensor

_DIMS = {2: 'dim, N', 3: 'batch, N, L', 4: 'batch, groups, N, L'}  # of B and C


def check_tensors(op, u, delta, A, B, C, D, delta_bias, z=None):
    """Check that each argument of a scan is a floating-point tensor of its dimensions."""
    for name, value, dims in (
        ('u', u, 'batch, dim, L'),
        ('delta', delta, 'batch, dim, L'),
        ('A', A, 'dim, N'),
        ('B', B, _matrix_dims(B)),
    ):
        check_tensor(op, name, value, dims)
    if C is not None:
        check_tensor(op, 'C', C, _matrix_dims(C))
    for name, option in (('D', D), ('delta_bias', delta_bias)):
        if option is not None:
            check_tensor(op, name, option, 'dim')
    if z is not None:
        check_tensor(op, 'z', z, 'batch, dim, L')


def _matrix_dims(B) -> str:
    """The dimensions that B or C has, by their number."""
    return _DIMS.get(B.dim(), _DIMS[4]) if isinstance(B, torch.Tensor) else _DIMS[4]


def check_shapes(op, u, delta, A, B, C, D, delta_bias, z=None):
    """Check that the shapes of a scan's arguments agree, in any of the forms of B, C and delta."""
    batch, dim, length = u.shape
    if delta.shape != u.shape:
        shared = delta.shape[1]
        if dim % shared:
            raise ValueError(f'{op}: delta has {shared} channels but u has {dim}, which {shared} does not divide')
        check_shape(op, 'delta', delta, (batch, shared, length), 'batch and L of u')
    d_state = _check_matrix(op, 'B', B, u)
    check_shape(op, 'A', A, (dim, d_state), 'dim of u, N of B')
    if d_state > MAX_STATE:
        raise ValueError(f'{op}: B has {d_state} states (N), at most {MAX_STATE} are supported')
    if C is None:
        for name, value in (('D', D), ('z', z)):
            if value is not None:
                raise ValueError(f'{op}: {name} is given, but C is None; states as output go without {name}')
    elif B.dim() == C.dim():
        check_shape(op, 'C', C, B.shape, 'the shape of B')
    elif _check_matrix(op, 'C', C, u) != d_state:
        raise ValueError(f'{op}: C has shape {tuple(C.shape)}, expected {d_state} states as in B, {tuple(B.shape)}')
    for name, value in (('D', D), ('delta_bias', delta_bias)):
        if value is not None:
            check_shape(op, name, value, (dim,), 'dim of u')
    if z is not None:
        check_shape(op, 'z', z, u.shape, 'the shape of u')


def _check_matrix(op, name, B, u):
    """Check B or C beside ``u``; returns N."""
    batch, dim, length = u.shape
    if B.dim() == 2:
        check_shape(op, name, B, (dim, B.shape[1]), 'dim of u, N')
        return B.shape[1]
    if B.dim() == 3:
        check_shape(op, name, B, (batch, B.shape[1], length), 'batch and L of u')
        return B.shape[1]
    groups = B.shape[1]
    if dim % groups:
        raise ValueError(f'{op}: {name} has {groups} groups but u has {dim} channels, which {groups} does not divide')
    check_shape(op, name, B, (batch, groups, B.shape[2], length), 'batch and L of u')
    return B.shape[2]

"""Argument checks shared by the public ops: each names the argument, what was found and what was expected."""

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_STATE = 256


def check_float(op: str, name: str, value, dims: str) -> None:
    """Check that ``value`` is a dense floating-point tensor; ``dims`` is only named in the error."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f'{op}: {name} must be a tensor of shape ({dims}), got {type(value).__name__}')
    if value.is_nested or value.layout != torch.strided:
        layout = 'nested' if value.is_nested else str(value.layout).replace('torch.', '')
        raise TypeError(f'{op}: {name} must be a dense tensor of shape ({dims}), got a {layout} one')
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f'{op}: {name} must be a floating-point tensor, got {dtype_name(value.dtype)}')


def check_tensor(op: str, name: str, value, dims: str) -> None:
    """Check that ``value`` is a floating-point tensor with the dimensions that ``dims`` lists, none of them empty."""
    check_float(op, name, value, dims)
    if value.dim() != len(dims.split(',')):
        raise ValueError(f'{op}: {name} must have the dimensions ({dims}), got shape {tuple(value.shape)}')
    if any(size == 0 for size in value.shape):
        raise ValueError(f'{op}: {name} has an empty dimension, got shape {tuple(value.shape)} for ({dims})')


def check_flag(op: str, name: str, value) -> None:
    """Check that a switch is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f'{op}: {name} is {value!r}, expected True or False')


def check_range(op: str, name: str, value, least, most) -> None:
    """Check that a number, whose type is right, lies between ``least`` and ``most``."""
    if not least <= value <= most:
        raise ValueError(f'{op}: {name} is {number_text(value)}, expected a number from {least} to {most}')


def check_shape(op: str, name: str, value: torch.Tensor, expected: tuple, why: str) -> None:
    """Check the exact shape of a tensor."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f'{op}: {name} has shape {tuple(value.shape)}, expected {tuple(expected)} ({why})')


def check_map_size(op: str, size) -> None:
    """Check that ``size`` is (H, W), two integers of at least 1; in a trace, those of a shape are tensors."""
    kinds = (int, torch.SymInt, torch.Tensor) if torch.jit.is_tracing() else (int, torch.SymInt)
    if not (isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, kinds) and n >= 1 for n in size)):
        raise ValueError(f'{op}: size is {size!r}, expected (H, W), two integers of at least 1')


def check_same_device(op: str, reference: str, tensors: dict) -> None:
    """Check that all tensors lie on the device of the one named ``reference``."""
    device = tensors[reference].device
    for name, value in tensors.items():
        if value is not None and value.device != device:
            raise ValueError(f'{op}: {name} is on {value.device}, but {reference} is on {device}')


def check_same_dtype(op: str, reference: str, tensors: dict, rule: str = 'outside autocast they must agree') -> None:
    """Check that all tensors have the dtype of the one named ``reference``, as ``rule`` says."""
    dtype = tensors[reference].dtype
    for name, value in tensors.items():
        if value is not None and value.dtype != dtype:
            raise TypeError(
                f'{op}: {name} is {dtype_name(value.dtype)}, but {reference} is {dtype_name(dtype)}; {rule}'
            )


def check_state_dtype(op: str, reference: torch.Tensor, tensors: dict) -> None:
    """Check that weights of the state equation have the dtype of the state."""
    expected = state_dtype(reference.dtype)
    for name, value in tensors.items():
        if value is not None and value.dtype != expected:
            raise TypeError(
                f'{op}: {name} is {dtype_name(value.dtype)}, expected {dtype_name(expected)}, the dtype of '
                f'the state for {dtype_name(reference.dtype)} inputs'
            )


def check_values(op: str, tensors: dict) -> None:
    """Check that every value of the named tensors is finite."""
    for name, value in tensors.items():
        if value is not None and not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise ValueError(f'{op}: {name} holds {count} values that are NaN or infinite, of {value.numel()}')


def check_out_dtype(op: str, out_dtype, dtype: torch.dtype) -> torch.dtype:
    """Resolve the output dtype: the input's, or float32."""
    if out_dtype is None:
        return dtype
    if out_dtype not in (dtype, torch.float32) or (dtype == torch.float64 and out_dtype != dtype):
        raise ValueError(
            f'{op}: out_dtype is {dtype_name(out_dtype)}, expected torch.float32 or the dtype of the '
            f'input, {dtype_name(dtype)}'
        )
    return out_dtype


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state, A, D and biases for inputs of ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def promote(tensors: tuple) -> tuple:
    """Bring tensors to their common dtype, as autocast does for ops that need one."""
    common = tensors[0].dtype
    for value in tensors[1:]:
        common = torch.promote_types(common, value.dtype)
    return tuple(value.to(common) for value in tensors)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for tensors of a device; torch raises when asked about ``meta``, which has none."""
    return device_type != 'meta' and torch.is_autocast_enabled(device_type)


def records_gradients(*tensors) -> bool:
    """Whether autograd will remember a call with these tensors, so that it must keep what its gradient reads.

    A trace goes on to be called with and without gradients, and torch checks one by another without them.
    """
    if not torch.is_grad_enabled() and not torch.jit.is_tracing():
        return False
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return True
    # vmap's tensors do not tell
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def number_text(value) -> str:
    """A number for an error; of an integer that is long, only how long, since Python refuses to write out some."""
    long = isinstance(value, int) and value.bit_length() > 64
    return f'an integer of {value.bit_length()} bits' if long else repr(value)


def dtype_name(dtype) -> str:
    """``float16`` for ``torch.float16``; the value's own text for anything else."""
    return str(dtype).replace('torch.', '')

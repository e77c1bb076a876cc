"""Arguments for the ops, valid and broken in one place; on the GPU too, where there is one."""

import functools

import pytest
import torch
from hypothesis import strategies as st

from mmvmamba.ops import BackendError, backend_report
from tests.test_ops.scan_inputs import SHARED_DTYPE

DEVICES = ('cpu', 'cuda') if torch.cuda.is_available() else ('cpu',)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = ('contiguous', 'transposed', 'gaps', 'far', 'negative', 'overlapping')
FAULTS = (
    'list',
    'text',
    'number',
    'integer',
    'complex',
    'bool',
    'float8',
    'sparse',
    'nested',
    'empty',
    'dimension',
    'size',
    'dtype',
    'meta',
    'device',
)
ELSEWHERE = ('meta', 'device')
"""Faults that are none of a lone tensor."""
ROUNDING = {torch.float64: 2.0**-52, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SPOILS = tuple(float(text) for text in ('nan', 'inf', '-inf'))
_SCALES = dict(normal=1.0, zeros=0.0, large=1e3, tiny=1e-30)


def lengths():
    """Lengths around the chunk of 64 steps, and others."""
    return st.one_of(st.sampled_from((1, 2, 63, 64, 65, 128, 129)), st.integers(1, 140))


def backends(device: str, dtype: torch.dtype, naive: bool = True):
    """Backends that can serve a call, None (the rule of ``auto``) among them; GPU kernels take no float64."""
    names = [status.name for status in backend_report() if status.available and {'any', device} & {*status.devices}]
    if device != 'cpu' and dtype == torch.float64:
        names = ['naive']
    return st.sampled_from((None, *(name for name in names if naive or name != 'naive')))


def spoil(arguments: dict, which: int, place: int, value: float) -> str:
    """Put a value into one of the tensors of ``arguments``, which is copied; returns its name."""
    names = [name for name, item in arguments.items() if isinstance(item, torch.Tensor)]
    name = names[which % len(names)]
    arguments[name] = arguments[name].clone(memory_format=torch.contiguous_format)
    arguments[name].view(-1)[place % arguments[name].numel()] = value
    return name


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (for ``overlapping``: some of them) in another place of memory."""
    if layout == 'transposed':
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == 'gaps':
        return tensor.new_full((*tensor.shape, 3), float('nan'))[..., 1].copy_(tensor)
    if layout == 'far':  # a first stride of 2**20 elements, of which few are ever touched
        inner = tensor[0].contiguous()
        room = tensor.new_empty(2**20 * (tensor.shape[0] - 1) + inner.numel())
        return room.as_strided(tensor.shape, (2**20, *inner.stride())).copy_(tensor)
    if layout == 'negative' and tensor.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag  # PyTorch negates when it is read
    if layout == 'overlapping':
        return tensor[:1].expand(tensor.shape)
    return tensor


@st.composite
def scan_arguments(
    draw, scales=('normal', 'normal', 'zeros', 'large', 'tiny'), max_channels=5, growth=False, naive=True
):
    """Valid arguments of ``selective_scan``, and whether A is large (then float32 holds exp(delta A) less well).

    With ``naive`` the backend may be the naive one.
    """
    batch, groups, channels = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, max_channels))
    states, length = draw(st.sampled_from((1, 1, 2, 3, 5, 17))), draw(lengths())
    dtype, dim, device = draw(st.sampled_from(DTYPES)), groups * channels, draw(st.sampled_from(DEVICES))
    shapes = dict(
        u=(batch, dim, length),
        delta=(batch, dim, length),
        A=(dim, states),
        B=(batch, groups, states, length),
        C=(batch, groups, states, length),
        D=(dim,),
        delta_bias=(dim,),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    arguments = dict(delta_softplus=draw(st.booleans()), backend=draw(backends(device, dtype, naive)))
    large = False
    for name, shape in shapes.items():
        if name in ('D', 'delta_bias') and draw(st.booleans()):
            continue
        scale = 'normal' if name == 'delta_bias' else draw(st.sampled_from(scales))
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * _SCALES[scale]
        if name == 'A' or (not growth and 'delta' in name and not arguments['delta_softplus']):
            value = value.abs() * (-1 if name == 'A' else 1)  # decay, as in the model
        large |= name == 'A' and scale == 'large'
        state = torch.float64 if dtype == torch.float64 else torch.float32
        value = value.to(device, dtype if name in SHARED_DTYPE else state)
        arguments[name] = lay_out(value, draw(st.sampled_from(LAYOUTS)))
    if draw(st.booleans()) and dtype != torch.float64:
        arguments['out_dtype'] = torch.float32
    return arguments, large


def broken(value: torch.Tensor, fault: str, axis: int):
    """A wrong argument in place of a tensor."""
    axis %= value.dim()
    other_dtype = torch.float32 if value.dtype == torch.float64 else torch.float64
    other_device = next((device for device in DEVICES if device != value.device.type), 'meta')
    ones = functools.partial(torch.ones, device=value.device)
    makers = dict(
        list=lambda: value.tolist(),
        text=lambda: 'u',
        number=lambda: 1.0,
        integer=lambda: ones(value.shape, dtype=torch.int64),
        complex=lambda: ones(value.shape, dtype=torch.complex64),
        bool=lambda: ones(value.shape, dtype=torch.bool),
        float8=lambda: ones(value.shape).to(torch.float8_e5m2),
        sparse=lambda: value.contiguous().to_sparse(),
        nested=lambda: torch.nested.nested_tensor([ones(2), ones(3)]),
        empty=lambda: value.narrow(axis, 0, 0),
        dimension=lambda: value[None],
        size=lambda: torch.cat([value, value.narrow(axis, 0, 1)], axis),
        dtype=lambda: value.to(other_dtype),
        meta=lambda: value.to('meta'),
        device=lambda: value.to(other_device),
    )
    return makers[fault]()


def assert_refused(op, arguments, names=None):
    """Hold a call to its contract for bad input: a documented error type, whose message names op and argument."""
    with pytest.raises((TypeError, ValueError, BackendError)) as caught:
        op(**arguments)
    message = str(caught.value)
    assert message.startswith(f'{op.__name__}: ') or 'backend' in message, message
    words = message.replace(',', ' ').replace(':', ' ').split()
    assert set(names or arguments) & set(words), message

"""Triton's kernels compile for a GPU, on a machine without one: its interpreter runs code that its compiler refuses."""

import importlib

import pytest
import torch

from mmvmamba.ops import SCAN_MODES

from .triton_interpreter import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the kernels are those of Triton's interpreter")
SHARED = 99 * 1024  # bytes of shared memory that a block may have on any GPU from sm_86 on
POINTERS = {torch.float16: '*fp16', torch.bfloat16: '*bf16', torch.float32: '*fp32', torch.float64: '*fp64'}


@pytest.fixture
def launches(monkeypatch):
    """Launches of kernels in place of their runs: kernel, arguments, options."""
    from triton.runtime.jit import JITFunction

    seen = []
    monkeypatch.setattr(JITFunction, 'run', lambda kernel, *args, **options: seen.append((kernel, args, options)))
    return seen


def compile_launch(kernel, args, options):
    """Compile a kernel for sm_90 as this launch would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    values = {**dict(zip(names, args)), **{name: options[name] for name in names if name in options}}
    signature, constants = {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = 'constexpr', value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS.get(value.dtype, '*i32')
        else:
            signature[parameter.name] = 'fp32' if isinstance(value, float) else 'i32'
    chosen = {name: options[name] for name in ('num_warps', 'num_stages', 'maxnreg') if name in options}
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget('cuda', 90, 32), options=chosen)
    assert compiled.asm['cubin']
    assert compiled.metadata.shared <= SHARED


def compile_all(launches, expected):
    compiled = set()
    for kernel, args, options in launches:
        compiled.add(kernel.__name__)
        compile_launch(kernel, args, options)
    assert compiled == expected


def module(op):
    return importlib.import_module(f'mmvmamba.ops.{op}.triton')  # the op hides the module of its name


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_ssd_scan(launches, dtype):
    draw = lambda *shape: torch.randn(shape, dtype=dtype)  # noqa: E731
    x, dt, B, C = draw(2, 81, 3, 16), draw(2, 81, 12), draw(2, 81, 4, 64), draw(2, 81, 4, 64)
    A, D, bias = -torch.rand(12), torch.randn(12, 16), torch.randn(12)
    module('ssd_scan').ssd_scan(x, dt, A, B, C, D, bias, None, True, False, False, 9, 9, 0)
    module('ssd_scan').ssd_scan_backward(x, None, x, dt, A, B, C, D, bias, None, True, 9, 9, 0)
    compile_all(launches, {'walk', 'outputs', 'gradients', 'add_routes'})


def test_selective_scan(launches):
    u, B, A = torch.randn(2, 8, 300), torch.randn(2, 4, 2, 300), -torch.rand(8, 2)
    D = torch.randn(8)
    out, states = module('selective_scan').selective_scan_fwd(u, u, A, B, B, D, D, True, torch.float32)
    module('selective_scan').selective_scan_bwd(out, u, u, A, B, B, D, D, states, True)
    compile_all(launches, {'_forward', '_backward'})


@pytest.mark.parametrize('channel_last', [False, True])
def test_cross_scan(launches, channel_last):
    for mode in range(len(SCAN_MODES)):
        x = torch.randn(2, 9, 5, 8, dtype=torch.float16)
        y = module('cross_scan').cross_scan(x, mode, channel_last)
        module('cross_scan').cross_merge(y, *((9, 5) if channel_last else (5, 8)), mode, channel_last)
    compile_all(launches, {'_last' if channel_last else '_first'})


@pytest.mark.slow  # half a minute: its loops over steps are unrolled
def test_ss2d_scan(launches):
    x = torch.randn(2, 32, 9, 40, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    shapes = ((4, 4, 32), (4, 32, 2), (4, 32), (128, 1), (128,))
    parameters = [torch.randn(shape) for shape in shapes]
    y, *saved = module('ss2d').ss2d_scan(x, *parameters, 'cross2d', torch.float16, True)
    module('ss2d').ss2d_scan_backward(y, x, *parameters, *saved, 'cross2d')
    compile_all(launches, {'prepare', 'forward_carries', 'backward_carries', 'combine', 'forward', 'backward'})


@pytest.mark.slow
@pytest.mark.parametrize('size, dtype', [((9, 7), torch.float16), ((7, 7), torch.float32)], ids=['chain', 'block'])
def test_ss2d_scan_of_several_states(launches, size, dtype):
    x = torch.randn(1, 32, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    parameters = [torch.randn(shape) for shape in ((4, 34, 32), (4, 32, 2), (4, 32), (128, 16), (128,))]
    y, *saved = module('ss2d').ss2d_scan(x, *parameters, 'cross2d', dtype, True)
    module('ss2d').ss2d_scan_backward(y, x, *parameters, *saved, 'cross2d')
    chained = {'leave_carries', 'leave_carries_back', 'combine'} if size == (9, 7) else set()
    compile_all(launches, {'prepare', 'scan', 'scan_back', *chained})

"""Time the ops of every backend at VMamba's shapes, after checking each against the naive backend.

On a GPU: python tools/benchmark/ops.py
On CPU:   python tools/benchmark/ops.py --device cpu    (also against pure-PyTorch formulations of the scan)

``--clock processor`` counts the processor time of all threads, for a machine that others use at the same time.
Prints a table, and writes it as JSON with --out FILE.  GB/s count the bytes that have to move, each once; the fraction
is of a large copy measured in the same run.  The naive backend, a Python loop, has one run a shape, and none on maps of
more than 4096 pixels.
"""

import argparse
import contextlib
import functools
import itertools
import math
import time
from pathlib import Path

import report
import timing
import torch
from torch_scan import FORMULATIONS
from torch_scan import selective_scan as torch_selective_scan

from mmvmamba.ops import backend_report, cross_merge, cross_scan, selective_scan, ss2d_scan, ssd_scan
from mmvmamba.ops.backend import BACKENDS
from mmvmamba.ops.ss2d.interface import use_composed
from mmvmamba.ops.ssd_scan import chunked, routes

# (batch, groups, channels of a group, N, height, width): the stages of VMamba-T at 224, and what detection feeds
SCAN_SHAPES = [
    (128, 4, 96, 1, 56, 56),
    (128, 4, 192, 1, 28, 28),
    (128, 4, 384, 1, 14, 14),
    (128, 4, 768, 1, 7, 7),
    (2, 4, 96, 1, 200, 336),
    (32, 4, 96, 16, 56, 56),
]
CPU_SCAN_SHAPES = [(8, 4, 192, 1, 56, 56)]
# (batch, channels, height, width), R of the fused core
CORE_SHAPES = [
    (128, 96, 56, 56, 6),
    (128, 192, 28, 28, 12),
    (128, 384, 14, 14, 24),
    (128, 768, 7, 7, 48),
    (128, 192, 56, 56, 6),
    (2, 96, 200, 336, 6),
]
CPU_CORE_SHAPES = [(8, 96, 56, 56, 6), (8, 192, 28, 28, 12), (8, 384, 14, 14, 24), (8, 768, 7, 7, 48)]
# (batch, channels, height, width), heads and N of the scan of Mamba-2: the stages of tiny-m2, and what detection feeds
SSD_SHAPES = [
    (128, 96, 56, 56, 6, 64),
    (128, 192, 28, 28, 12, 64),
    (128, 384, 14, 14, 24, 64),
    (128, 768, 7, 7, 48, 64),
    (2, 96, 200, 336, 6, 64),
]
CPU_SSD_SHAPES = [(8, 96, 28, 28, 6, 64), (8, 384, 14, 14, 24, 64)]
CROSS_SHAPES = [(128, 96, 56, 56), (128, 384, 14, 14), (2, 96, 200, 336)]
CPU_CROSS_SHAPES = [(8, 96, 56, 56)]
NAIVE_STEPS = 4096
LIMIT = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def scan_inputs(shape, dtype, device):
    """Arguments of selective_scan with the statistics of a trained model, and a gradient of its output."""
    batch, groups, channels, states, height, width = shape
    dim, length = groups * channels, height * width
    u, delta, dout = (torch.randn(batch, dim, length, device=device) for _ in range(3))
    B, C = (torch.randn(batch, groups, states, length, device=device) for _ in range(2))
    A = -torch.exp(0.5 * torch.randn(dim, states, device=device))
    D, bias = torch.randn(dim, device=device), 0.5 * torch.randn(dim, device=device) - 3
    return [u.to(dtype), (0.5 * delta).to(dtype), A, B.to(dtype), C.to(dtype), D, bias], dout


def error_against(function, reference, inputs, dout):
    """Largest relative error over the output and every gradient; NaN if one of them is."""
    results = []
    for f in (function, reference):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = f(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))])
    pairs = [(a.double(), b.double()) for a, b in zip(*results)]
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()  # max() of Python may drop a NaN


def check_error(op, shape, name, error, dtype):
    """Stop the benchmark if a backend is wrong; a NaN is."""
    if not error < LIMIT[dtype]:
        raise SystemExit(f'{op} {"x".join(map(str, shape))}: {name} is wrong, relative error {error:.2e}')


def timed_backends(backends, height, width):
    """The backends that are timed on maps of this size."""
    return [name for name in backends if name != 'naive' or height * width <= NAIVE_STEPS]


def measure(name, op, shape, function, inputs, dout, moved, ceiling, device, repeats):
    """One row: forward, backward and their sum in ms, with bandwidths."""
    with torch.no_grad():
        forward = timing.time_ms(lambda: function(*inputs), device, repeats)
    leaves = [t.detach().requires_grad_() for t in inputs]

    def both():
        out = function(*leaves)
        torch.autograd.grad(out, leaves, dout)

    if device == 'cuda':
        out = function(*leaves)
        backward = timing.time_ms(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), device, repeats)
        total = forward + backward
    else:
        total = timing.time_ms(both, device, repeats, warmup=1)
        backward = total - forward
    row = dict(op=op, shape='x'.join(map(str, shape)), backend=name, forward_ms=forward, backward_ms=backward)
    row['total_ms'] = total
    for which, ms in (('forward', forward), ('backward', backward)):
        row[f'{which}_GBps'] = moved[which] / ms / 1e6
        row[f'{which}_fraction'] = row[f'{which}_GBps'] / ceiling
    return row


def scan_cases(device, dtype, backends, ceiling, repeats):
    """Rows of selective_scan."""
    for shape in SCAN_SHAPES if device == 'cuda' else CPU_SCAN_SHAPES:
        inputs, dout = scan_inputs(shape, dtype, device)
        # on CPU the speed of the others is given as a multiple of naive's
        names = dict.fromkeys([*backends, 'naive'] if device == 'cpu' else backends)
        functions = {
            name: lambda *a, name=name: selective_scan(*a, True, out_dtype=torch.float32, backend=name)
            for name in timed_backends(names, *shape[-2:])
        }
        if device == 'cpu':
            functions.update({f'torch {f}': lambda *a, f=f: torch_selective_scan(*a, f) for f in FORMULATIONS})
        # the naive loop is slow: check on one image
        few = [t[:1] if t.dim() > 2 else t for t in inputs]
        size, in_bytes = inputs[0].numel(), inputs[0].element_size()
        small = inputs[3].numel()
        moved = dict(
            forward=size * (2 * in_bytes + 4) + 2 * small * in_bytes,
            backward=size * (4 * in_bytes + 4) + 4 * small * in_bytes,
        )
        for name, function in functions.items():
            error = error_against(
                function, lambda *a: selective_scan(*a, True, out_dtype=torch.float32, backend='naive'), few, dout[:1]
            )
            check_error('selective_scan', shape, name, error, dtype)
            slow = name == 'naive'
            row = measure(
                name, 'selective_scan', shape, function, inputs, dout, moved, ceiling, device, 1 if slow else repeats
            )
            yield {**row, 'error': error}


def cross_cases(device, dtype, backends, ceiling, repeats):
    """Rows of cross_scan + cross_merge; forward is the scan, backward the merge."""
    for shape in CROSS_SHAPES if device == 'cuda' else CPU_CROSS_SHAPES:
        for channel_last in (False, True):
            batch, channels, height, width = shape
            x = torch.randn((batch, height, width, channels) if channel_last else shape, device=device).to(dtype)
            moved = dict.fromkeys(('forward', 'backward'), 5 * x.numel() * x.element_size())
            op = f'cross_scan, cross_merge ({"NHWC" if channel_last else "NCHW"})'
            for name in dict.fromkeys([*backends, 'naive']):
                y = cross_scan(x, 'cross2d', channel_last, name)
                merged = cross_merge(y, (height, width), 'cross2d', channel_last, name)
                expected = cross_scan(x, 'cross2d', channel_last, 'naive')
                error = ((merged.double() - 4 * x.double()).norm() / (4 * x.double()).norm()).item()
                check_error(op, shape, name, error if torch.equal(y, expected) else math.inf, dtype)
                scan = timing.time_ms(lambda: cross_scan(x, 'cross2d', channel_last, name), device, repeats)  # noqa: B023
                merge = timing.time_ms(
                    lambda: cross_merge(y, (height, width), 'cross2d', channel_last, name),  # noqa: B023
                    device,
                    repeats,
                )
                row = dict(op=op, shape='x'.join(map(str, shape)), backend=name, forward_ms=scan, backward_ms=merge)
                row.update(total_ms=scan + merge, error=error)
                for which, ms in (('forward', scan), ('backward', merge)):
                    row[f'{which}_GBps'] = moved[which] / ms / 1e6
                    row[f'{which}_fraction'] = row[f'{which}_GBps'] / ceiling
                yield row


def core_inputs(shape, dtype, device, states=1):
    """Arguments of ss2d_scan with the statistics of a trained model, or with the A of a new one if N is above 1."""
    batch, channels, height, width, rank = shape
    x = torch.randn(batch, height, width, channels, device=device).to(dtype).permute(0, 3, 1, 2)
    draw = functools.partial(torch.randn, device=device)
    parameters = (
        draw(4, rank + 2 * states, channels) * channels**-0.5,
        0.5 * draw(4, channels, rank) * rank**-0.5,
        0.5 * draw(4, channels) - 3,
        0.5 * draw(4 * channels, states) + torch.arange(1, states + 1, device=device).log(),
        draw(4 * channels),
    )
    return [x, *parameters]


def core_cases(device, dtype, backends, ceiling, repeats, numbers=(1,)):
    """Rows of ss2d_scan, fused and composed of the unfused ops; on a GPU replayed from a graph, as in training.

    ``numbers`` are those of states a channel, N.
    """
    for shape, states in itertools.product(CORE_SHAPES if device == 'cuda' else CPU_CORE_SHAPES, numbers):
        inputs = core_inputs(shape, dtype, device, states)
        dout = torch.randn_like(inputs[0])
        few, few_dout = [inputs[0][:1], *inputs[1:]], dout[:1]
        size = inputs[0].numel() * inputs[0].element_size()
        for backend in timed_backends(backends, *shape[2:4]):
            slow = backend == 'naive'
            for fused in (False,) if slow else (True, False):
                name = backend if fused or slow else f'{backend}, unfused'
                with contextlib.nullcontext() if fused else use_composed():
                    error = error_against(functools.partial(ss2d_scan, backend=backend), exact_core, few, few_dout)
                    check_error('ss2d_scan', shape, name, error, dtype)
                    run = functools.partial(ss2d_scan, backend=backend)
                    row = core_row(run, inputs, dout, device, 1 if slow else repeats, not slow)
                label = 'x'.join(map(str, shape)) + f' N={states}' * (states > 1)
                row.update(op='ss2d_scan', shape=label, backend=name, error=error)
                for which, factor in (('forward', 2), ('backward', 3)):
                    row[f'{which}_GBps'] = factor * size / row[f'{which}_ms'] / 1e6
                    row[f'{which}_fraction'] = row[f'{which}_GBps'] / ceiling
                yield row


def ssd_inputs(shape, dtype, device):
    """Arguments of ssd_scan for the routes of a map; dt, B and C are views of one tensor, as in the model."""
    batch, channels, height, width, heads, states = shape
    draw = functools.partial(torch.randn, device=device)
    x = draw(batch, height * width, heads, channels // heads).to(dtype)
    maps = draw(batch, height * width, 4 * (heads + 2 * states)).to(dtype)
    dt, B, C = maps.split([4 * heads, 4 * states, 4 * states], dim=2)
    A, D = -torch.exp(0.5 * draw(4 * heads)), draw(4 * heads, channels // heads)
    return [x, dt, A, B.unflatten(2, (4, -1)), C.unflatten(2, (4, -1)), D, 0.5 * draw(4 * heads) - 3]


def run_ssd(x, dt, A, B, C, D, dt_bias, size, backend):
    """ssd_scan along the routes of a map."""
    return ssd_scan(x, dt, A, B, C, D, dt_bias, dt_softplus=True, size=size, backend=backend)


def exact_ssd(x, dt, A, B, C, D, dt_bias, size):
    """The same by matrix products in float64: the naive loop of a large map keeps too many states for its gradient."""
    x, dt, A, B, C, D, dt_bias = (value.double() for value in (x, dt, A, B, C, D, dt_bias))
    x, dt, B, C = routes.scan_inputs(x, dt, B, C, size, 'cross2d')
    out, _ = chunked.ssd_scan(x, dt, A, B, C, D, dt_bias, dt_softplus=True)
    return routes.merge(out, size, 'cross2d')


def ssd_cases(device, dtype, backends, ceiling, repeats):
    """Rows of ssd_scan along the routes of a map; on a GPU replayed from a graph, as in training."""
    for shape in SSD_SHAPES if device == 'cuda' else CPU_SSD_SHAPES:
        inputs, size = ssd_inputs(shape, dtype, device), shape[2:4]
        dout = torch.randn_like(inputs[0])
        few = [value[:1] if value.dim() > 2 else value for value in inputs]
        sizes = [inputs[i].numel() * inputs[i].element_size() for i in (0, 1, 3, 4)]

        for backend in timed_backends([name for name in backends if name != 'cuda'], *size):
            run, slow = functools.partial(run_ssd, size=size, backend=backend), backend == 'naive'
            error = error_against(run, functools.partial(exact_ssd, size=size), few, dout[:1])
            check_error('ssd_scan', shape, backend, error, dtype)
            row = core_row(run, inputs, dout, device, 1 if slow else repeats, not slow)
            row.update(op='ssd_scan', shape='x'.join(map(str, shape)), backend=backend, error=error)
            # x, dt, B and C in and y out; their gradients too
            for which, moved in (('forward', sum(sizes) + sizes[0]), ('backward', 2 * sum(sizes) + sizes[0])):
                row[f'{which}_GBps'] = moved / row[f'{which}_ms'] / 1e6
                row[f'{which}_fraction'] = row[f'{which}_GBps'] / ceiling
            yield row


def exact_core(*arguments):
    """The naive backend's ss2d_scan in float64."""
    return ss2d_scan(*(t.double() for t in arguments), backend='naive').to(arguments[0].dtype)


def core_row(run, inputs, dout, device, repeats, graphed):
    """Times, and the peak memory of forward and backward; ``graphed``: from CUDA graphs, on a GPU."""
    leaves = [t.detach().requires_grad_() for t in inputs]

    def forward():
        with torch.no_grad():
            return run(*inputs)

    def both():
        return torch.autograd.grad(run(*leaves), leaves, dout)

    both()
    peak = 0.0
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() - inputs[0].numel() * inputs[0].element_size()  # x is the op's own
        both()
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30
        if graphed:  # the naive loop is too many kernels for one
            forward, both = timing.graphed(forward), timing.graphed(both)
    ahead, total = timing.time_ms(forward, device, repeats), timing.time_ms(both, device, repeats)
    return dict(forward_ms=ahead, backward_ms=total - ahead, total_ms=total, peak_GiB=peak)


def ratios(rows):
    """How many times faster the compiled CPU scan is than the loop and than the best pure-PyTorch one; maybe empty."""
    times = {row['backend']: row for row in rows if row['op'] == 'selective_scan'}
    if 'cpu' not in times:
        return {}
    others = [times[name] for name in times if name.startswith('torch ')]
    result = {}
    for key in ('forward_ms', 'total_ms'):
        best = min(row[key] for row in others)
        result[key] = dict(naive=times['naive'][key] / times['cpu'][key], best_torch=best / times['cpu'][key])
    return result


CASES = dict(selective_scan=scan_cases, ss2d_scan=core_cases, ssd_scan=ssd_cases, cross_scan=cross_cases)


def main(arguments=None):
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--ops', nargs='+', choices=list(CASES), default=list(CASES), help='default: all')
    parser.add_argument('--backends', nargs='+', choices=BACKENDS, help='default: all that can run')
    parser.add_argument('--dtype', choices=['float32', 'float16', 'bfloat16'], help='default: float16, on CPU float32')
    parser.add_argument(
        '--states', nargs='+', type=int, default=[1], metavar='N', help='states a channel of ss2d_scan (default: 1)'
    )
    parser.add_argument('--repeats', type=int, help='runs per median (default: 25, on CPU 5)')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default: 2)')
    parser.add_argument(
        '--clock',
        choices=['wall', 'processor'],
        default='wall',
        help='clock on CPU: wall time, or processor time of all threads',
    )
    parser.add_argument('--out', type=Path, metavar='FILE', help='write the rows to this JSON file')
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype or ('float32' if args.device == 'cpu' else 'float16'))
    if args.device == 'cpu' and dtype != torch.float32:
        parser.error('--device cpu compares with formulations written for float32')
    repeats = args.repeats or (5 if args.device == 'cpu' else 25)
    backends = [s.name for s in backend_report() if s.available and {args.device, 'any'} & set(s.devices)]
    backends = [name for name in backends if name in (args.backends or backends)]
    if not backends:
        parser.error(f'--backends {" ".join(args.backends)}: none can run on {args.device}')
    backends.sort(key=lambda name: name == 'naive')  # the slow one last
    if args.clock == 'processor':
        timing.time_ms = functools.partial(timing.time_ms, clock=time.process_time)
    ceiling = timing.copy_ceiling(args.device)
    print(f'{report.machine_name(args.device)}, torch {torch.__version__}, {dtype}, copy ceiling {ceiling:.0f} GB/s')

    print(
        f'{"op":34}{"shape":22}{"backend":16}{"fwd ms":>9}{"GB/s":>7}{"":>5}{"bwd ms":>9}{"GB/s":>7}{"":>5}{"error":>9}'
    )
    rows = []
    for op in args.ops:
        own = dict(numbers=args.states) if op == 'ss2d_scan' else {}
        for row in CASES[op](args.device, dtype, backends, ceiling, repeats, **own):
            rows.append(row)
            print(
                f'{row["op"]:34}{row["shape"]:22}{row["backend"]:16}'
                f'{row["forward_ms"]:9.3f}{row["forward_GBps"]:7.0f}{row["forward_fraction"]:5.0%}'
                f'{row["backward_ms"]:9.3f}{row["backward_GBps"]:7.0f}{row["backward_fraction"]:5.0%}{row["error"]:9.1e}',
                flush=True,
            )
    facts = dict(clock=args.clock, dtype=str(dtype).removeprefix('torch.'), copy_GBps=ceiling)
    if args.device == 'cpu':
        facts['cpu_faster_by'] = ratios(rows)
        for key, factors in facts['cpu_faster_by'].items():
            what = 'forward' if key == 'forward_ms' else 'forward+backward'
            print(f'{what}: cpu is {factors["naive"]:.1f}x naive, {factors["best_torch"]:.1f}x the best pure PyTorch')
    if args.out:
        report.write(args.out, args.device, rows, **facts)


if __name__ == '__main__':
    main()

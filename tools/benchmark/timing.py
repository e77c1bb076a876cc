"""Timing shared by the benchmarks: medians of repeated runs, and the memory bandwidth that can be reached at all."""

import statistics
import time

import torch


def time_ms(function, device: str, repeats: int, warmup: int = 2, clock=time.perf_counter) -> float:
    """Median time of a call in milliseconds; on a GPU by CUDA events around batches of calls, on CPU by ``clock``."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        if device == 'cpu':
            start = clock()
            function()
            times.append((clock() - start) * 1e3)
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 5)
    return statistics.median(times)


def graphed(function):
    """A function that replays ``function``'s kernels from a CUDA graph, so that the host costs nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    keep = (graph, results)
    return lambda: keep[0].replay()


def copy_ceiling(device: str) -> float:
    """Bandwidth of a large copy in GB/s, counting bytes read and written."""
    size = 1 << (30 if device == 'cuda' else 27)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / time_ms(lambda: target.copy_(source), device, 9) / 1e6

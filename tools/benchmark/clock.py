"""Where the time of a training iteration goes: iterations, phases, kernels."""

import time
from collections import defaultdict
from functools import partial

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

PARTS = ('forward', 'loss', 'loss_and_predict')  # methods by which a detector or segmentor calls its parts
PROFILED = 3  # iterations under the profiler


class Enough(Exception):  # noqa: N818  (no error: it ends a run that has been measured)
    """The run has been measured."""


class Clock(Hook):
    """Times a run: warm-up, iterations as they are, iterations with a synchronisation after each phase, a profile.

    Args:
        device (str): ``cuda`` or ``cpu``.
        warmup (int): Iterations that are not timed.
        iterations (int): Iterations that are.
        phases (int): Iterations by phase.
        profile (bool): Whether to profile a few more.
    """

    priority = 'LOWEST'

    def __init__(self, device: str, warmup: int, iterations: int, phases: int, profile: bool):
        self.device, self.first = device, warmup
        self.second = self.first + iterations
        self.third = self.second + phases + (phases > 0)  # the first of them is not whole
        self.last = self.third + (PROFILED + 1 if profile else 0)
        self.times: list = []
        self.wall, self.peak, self.reserved = 0.0, 0.0, 0.0
        self.count, self.kernels = 0, {}
        self.phases = Phases(device)
        self.profiler = None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.count += 1
        if self.first <= self.count <= self.second:
            if self.count == self.first:
                synchronize(self.device)
                if self.device == 'cuda':
                    torch.cuda.reset_peak_memory_stats()
                self.begin = time.perf_counter()
            self.times.append(self._mark())
        if self.count == self.second:
            synchronize(self.device)
            self.wall = time.perf_counter() - self.begin
            if self.device == 'cuda':
                self.peak = torch.cuda.max_memory_allocated() / 2**30
                self.reserved = torch.cuda.max_memory_reserved() / 2**30  # with what CUDA graphs keep
            if self.third > self.second:
                self.phases.start(runner)
        if self.count == self.third and self.third > self.second:
            self.phases.stop()
        if self.count == self.third and self.last > self.third:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device == 'cuda':
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities)
            synchronize(self.device)
            self.profiler.__enter__()
        if self.count >= self.last:
            if self.profiler is not None:
                synchronize(self.device)
                self.profiler.__exit__(None, None, None)
                self.kernels = count_kernels(self.profiler, self.last - self.third)
            raise Enough

    def _mark(self):
        if self.device == 'cpu':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def iterations(self) -> list:
        """Milliseconds of each iteration; on a GPU from the end of one on the device to that of the next."""
        pairs = zip(self.times, self.times[1:])
        if self.device == 'cpu':
            return [(end - begin) * 1e3 for begin, end in pairs]
        return [begin.elapsed_time(end) for begin, end in pairs]


class Phases:
    """Milliseconds of the phases of an iteration, with a synchronisation after each.

    Args:
        device (str): ``cuda`` or ``cpu``.
    """

    def __init__(self, device: str):
        self.device, self.seconds, self.count = device, defaultdict(float), 0
        self.host_seconds: dict = defaultdict(float)
        self.hook_seconds: dict = defaultdict(float)
        self._undo: list = []
        self._depth = 0
        self._began, self._stopped = 0.0, False

    def start(self, runner) -> None:
        """Wrap what an iteration calls."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._wrap(model.data_preprocessor, 'forward', 'preprocess')
        for name, child in model.named_children():
            if name != 'data_preprocessor':
                for method in PARTS:
                    if hasattr(child, method):
                        self._wrap(child, method, name)
        self._wrap(runner.optim_wrapper, 'backward', 'backward')
        for method in ('step', 'zero_grad'):
            self._wrap(runner.optim_wrapper, method, 'optimizer')
        self._wrap(runner, 'call_hook', 'hooks')
        for hook in runner.hooks:
            for method in ('before_train_iter', 'after_train_iter'):
                if getattr(type(hook), method) is not getattr(Hook, method) and not isinstance(hook, Clock):
                    self._replace(hook, method, partial(self._timed_hook, type(hook).__name__, getattr(hook, method)))
        self._wrap(runner.model, 'train_step', 'train_step', outer=True)
        self.begin = None

    def stop(self) -> None:
        """Put everything back; called by the last hook of an iteration, whose hooks end here."""
        synchronize(self.device)
        spent = time.perf_counter() - self._began
        self.seconds['hooks'] += spent
        self.host_seconds['hooks'] += spent
        for undo in self._undo:
            undo()
        self._undo, self._stopped = [], True

    def milliseconds(self) -> dict:
        """Of an iteration, by phase; ``other`` is the rest of ``train_step``, such as the parsing of losses."""
        if not self.count:
            return {}
        found = self._of_an_iteration(self.seconds)
        step = found.pop('train_step', 0.0)
        inside = sum(value for name, value in found.items() if name not in ('hooks', 'data'))
        return {**found, 'other': max(step - inside, 0.0)}

    def host_milliseconds(self) -> dict:
        """Of an iteration, by phase, until the host goes on: the rest of a phase is the device's alone."""
        return self._of_an_iteration(self.host_seconds)

    def hook_milliseconds(self) -> dict:
        """Of an iteration, by the class of the hook, the slowest first; their sum is the phase ``hooks``."""
        return dict(sorted(self._of_an_iteration(self.hook_seconds).items(), key=lambda item: -item[1]))

    def _of_an_iteration(self, seconds: dict) -> dict:
        return {name: 1e3 * value / max(self.count, 1) for name, value in seconds.items()}

    def _wrap(self, owner, method: str, name: str, outer: bool = False) -> None:
        self._replace(owner, method, partial(self._timed, getattr(owner, method), name, outer))

    def _replace(self, owner, method: str, function) -> None:
        present = owner.__dict__.get(method)
        object.__setattr__(owner, method, function)
        if present is None:
            self._undo.append(partial(owner.__dict__.pop, method))
        else:
            self._undo.append(partial(object.__setattr__, owner, method, present))

    def _timed_hook(self, name, function, *args, **kwargs):
        synchronize(self.device)
        begin = time.perf_counter()
        function(*args, **kwargs)
        synchronize(self.device)
        self.hook_seconds[name] += time.perf_counter() - begin

    def _timed(self, function, name, outer, *args, **kwargs):
        if self._depth and not outer:
            return function(*args, **kwargs)
        if name == 'hooks' and args[:1] == ('before_train_iter',) and self.begin is not None:
            synchronize(self.device)
            self.seconds['data'] += time.perf_counter() - self.begin
            self.count += 1
        synchronize(self.device)
        begin = self._began = time.perf_counter()
        self._depth += not outer
        try:
            return function(*args, **kwargs)
        finally:
            self._depth -= not outer
            returned = time.perf_counter()
            synchronize(self.device)
            end = time.perf_counter()
            # not of the call in which it stops, where a profiler may have started since
            if not self._stopped and (name != 'hooks' or self.begin is not None):
                self.seconds[name] += end - begin
                if not outer:
                    self.host_seconds[name] += returned - begin
            if name == 'hooks' and args[:1] == ('after_train_iter',):
                self.begin = end
                if not self.count:  # the iteration in which this began is not whole
                    self.seconds.clear()
                    self.host_seconds.clear()
                    self.hook_seconds.clear()


def count_kernels(profiler, iterations: int) -> dict:
    """Of an iteration: milliseconds in which the device was busy, launches by the host, and kernels.

    Args:
        profiler (torch.profiler.profile): After its run.
        iterations (int): Iterations in it.
    """
    spans, launches = [], 0
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            if event.duration_ns() > 0 and not getattr(event, 'is_user_annotation', bool)():
                spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
        elif 'Launch' in event.name() and event.name().startswith('cu'):
            launches += 1
    busy, until = 0, 0
    for begin, end in sorted(spans):
        busy += max(end - max(begin, until), 0)
        until = max(until, end)
    return dict(busy_ms=busy / 1e6 / iterations, launches=launches // iterations, kernels=len(spans) // iterations)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == 'cuda':
        torch.cuda.synchronize()

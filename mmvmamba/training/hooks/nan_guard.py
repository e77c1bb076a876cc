"""Stop a run at its first NaN or infinity, say where it arose, and keep what is needed to see it again."""

import contextlib
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.structures import BaseDataElement

from mmvmamba.checkpoint.whole import PART, commit, remove
from mmvmamba.registry import register_hook
from mmvmamba.training.compiling import pause


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; the message names where it arose."""


@register_hook
class NaNGuardHook(Hook):
    """Look at every loss before it is used, and at the gradients before the optimizer's step.

    At the first bad number the iteration is run again under inspection, with the same random state. The weights are
    still those of the iteration's start, and buffers (running averages) are put back to what they were then. The run
    stops with :class:`NonFiniteError`, which names the first module and tensor that went bad: a parameter, a buffer, an
    input of the model, or the output of a module whose inputs are good; for gradients the last module, in the order of
    the forward pass, whose output has a bad gradient. Written next to the logs, ``nan_iter_<iteration>_rank<rank>.pth``
    holds the batch, the random state and the weights, and can be read with ``torch.load(weights_only=True)``; where it
    can't be written, the message says why.

    Looking costs one wait for the device and a copy of the buffers. With ``interval`` above 1 all other iterations cost
    nothing; a bad number in between is found at the next look, and by then may be in the weights, which the message
    says. With dynamic loss scaling, infinite gradients are a normal event that the scaler handles: they are not
    checked.

    Args:
        check_gradients (bool): Whether to look at gradients too. Default: True.
        interval (int): Iterations from one look to the next. Default: 1.
    """

    priority = 'VERY_HIGH'

    def __init__(self, check_gradients: bool = True, interval: int = 1):
        if not isinstance(check_gradients, bool):
            raise TypeError(f'check_gradients is {check_gradients!r}, expected True or False')
        if isinstance(interval, bool) or not isinstance(interval, int):
            raise TypeError(f'interval is {interval!r}, expected an integer')
        if interval < 1:
            raise ValueError(f'interval is {interval}, expected at least 1')
        self.check_gradients, self.interval = check_gradients, interval
        self._looks = False
        self._handles: list = []
        self._buffers: list = []
        self._call: tuple = ()
        self._batch, self._inspecting = None, False

    def before_train(self, runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._runner, self._model = runner, model
        self._handles = [
            model.register_forward_pre_hook(self._remember, with_kwargs=True),
            model.register_forward_hook(self._check_losses, with_kwargs=True),
        ]
        optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
        if self.check_gradients and isinstance(optimizer, torch.optim.Optimizer):
            self._handles.append(optimizer.register_step_pre_hook(self._check_gradients))

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._looks = (runner.iter + 1) % self.interval == 0
        self._batch = data_batch if self._looks else None

    def after_train(self, runner) -> None:
        self._let_go()

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._batch, self._call, self._buffers = [], None, (), []

    def _remember(self, model, args, kwargs) -> None:
        if self._looks and model.training and not self._inspecting:
            self._call = (args, kwargs, _random_state())
            self._buffers = [
                (module, name, buffer.detach().clone())
                for module in model.modules()
                for name, buffer in module.named_buffers(recurse=False)
            ]

    def _restore_buffers(self) -> None:
        """Put buffers back to what they were before the forward pass, which may have made them bad too."""
        for module, name, value in self._buffers:
            setattr(module, name, value.clone())

    def _check_losses(self, model, args, kwargs, losses) -> None:
        if not self._looks or not model.training or self._inspecting or not isinstance(losses, dict):
            return
        bad = [name for name, value in losses.items() if not all(_is_finite(tensor) for tensor in _tensors(value))]
        if bad:
            with torch.no_grad():
                place = self._inspect_forward()
            self._stop(f'{", ".join(bad)} of the model is not finite: {place}')

    def _check_gradients(self, optimizer, *_) -> None:
        # a fused optimizer skips a step by itself
        if not self._looks or getattr(optimizer, 'found_inf', None) is not None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        if not gradients or torch.stack([g.isfinite().all() for g in gradients]).all():
            return
        named = [name for name, p in self._model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
        place = self._inspect_backward()
        self._stop(f'the gradients of {len(named)} parameters are not finite (the last is {named[-1]}): {place}')

    def _inspect_forward(self) -> str:
        """Where the first bad tensor of a forward pass arises."""
        self._restore_buffers()
        for kind, tensors in (('parameter', self._model.named_parameters()), ('buffer', self._model.named_buffers())):
            for name, tensor in tensors:
                if not _is_finite(tensor):
                    return f'{kind} {name} was already bad before this iteration, {_describe(tensor)}'
        args, kwargs, _ = self._call
        for tensor in _tensors((args, kwargs)):
            if not _is_finite(tensor):
                return f'the input batch already contains {_describe(tensor)}'
        found: list = []

        def look(module, inputs, output):
            if found or all(_is_finite(tensor) for tensor in _tensors(output)):
                return
            if all(_is_finite(tensor) for tensor in _tensors(inputs)):
                name = next(name for name, item in self._model.named_modules() if item is module)
                bad = next(tensor for tensor in _tensors(output) if not _is_finite(tensor))
                found.append(f'it arises in {name or "the model"} ({type(module).__name__}), {_describe(bad)}')

        self._run_again([module.register_forward_hook(look) for module in self._model.modules()])
        return found[0] if found else 'it did not arise again when the iteration was repeated'

    def _inspect_backward(self) -> str:
        """Where the first bad gradient of a backward pass arises."""
        found: list = []

        def keep(name, gradient):
            if not _is_finite(gradient):
                found.append((name, gradient))

        def watch(module, inputs, output):
            name = next(name for name, item in self._model.named_modules() if item is module)
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: keep(name, gradient))

        with torch.enable_grad():
            leaves = [module for module in self._model.modules() if not any(True for _ in module.children())]
            losses = self._run_again([module.register_forward_hook(watch) for module in leaves])
            loss = sum(tensor.mean() for name, value in losses.items() if 'loss' in name for tensor in _tensors(value))
            parameters = [p for p in self._model.parameters() if p.requires_grad]
            torch.autograd.grad(loss, parameters, allow_unused=True)
        if not found:
            return 'no output of a module has a bad gradient, so it arises where that parameter is used'
        name, gradient = found[0]
        return f'the first bad gradient is that of the output of {name}, {_describe(gradient)}'

    def _run_again(self, handles):
        args, kwargs, state = self._call
        self._inspecting = True
        self._restore_buffers()
        try:
            _set_random_state(state)
            with pause(self._model), self._runner.optim_wrapper.optim_context(self._model):
                return self._model(*args, **kwargs)
        finally:
            self._inspecting = False
            for handle in handles:
                handle.remove()

    def _stop(self, problem: str) -> None:
        self._restore_buffers()
        runner = self._runner
        path = Path(runner.work_dir) / f'nan_iter_{runner.iter}_rank{get_rank()}.pth'
        kept, failure = f'are in {path}', None
        try:
            content = dict(
                batch=_plain(self._batch),
                random_state=self._call[2],
                state_dict={name: value.detach().cpu() for name, value in self._model.state_dict().items()},
                iter=runner.iter,
                epoch=runner.epoch,
                problem=problem,
            )
            torch.save(content, str(path) + PART)
            commit(str(path) + PART, str(path))
        except Exception as error:  # whatever it is, what was found must not be lost
            reason = getattr(error, 'strerror', None) or str(error).split('\n')[0] or type(error).__name__
            kept, failure = f'could not be saved in {path} ({reason})', error
            with contextlib.suppress(OSError):
                remove(str(path) + PART)
        self._let_go()
        raise NonFiniteError(f'iteration {runner.iter}: {problem}. Batch, random state and weights {kept}') from failure


def _tensors(value):
    """The floating-point tensors in nested containers and data samples."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, BaseDataElement):
        for item in value.values():
            yield from _tensors(item)


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _describe(tensor: torch.Tensor) -> str:
    nans, infinities = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    kind = str(tensor.dtype).replace('torch.', '')
    return f'{nans} NaN and {infinities} infinite of the {tensor.numel()} values, {kind} {tuple(tensor.shape)}'


def _plain(value):
    """A batch as tensors, numbers, text and containers, which torch loads safely."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in 'biuf':
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, BaseDataElement):
        return {**_plain(dict(value.metainfo_items())), **_plain(dict(value.items()))}
    if hasattr(value, 'tensor') and isinstance(value.tensor, torch.Tensor):  # boxes
        return _plain(value.tensor)
    if hasattr(value, 'masks'):  # bitmaps or polygons
        return _plain(value.masks)
    return str(value)


def _random_state() -> dict:
    gpus = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return dict(torch=torch.get_rng_state(), cuda=gpus)


def _set_random_state(state: dict) -> None:
    torch.set_rng_state(state['torch'])
    if state['cuda'] is not None:
        torch.cuda.set_rng_state(state['cuda'])

"""An optimizer's step for which the host does not wait."""

import contextlib
import logging
from operator import itemgetter
from typing import Any, Optional, Union

import torch
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from torch import nn

from mmvmamba.registry import OPTIM_WRAPPERS

from .scalars import pending_history

DTYPES = dict(float16=torch.float16, bfloat16=torch.bfloat16)
# how an optimizer computes, not what: a checkpoint does not decide it
_MEANS = ('foreach', 'fused', 'capturable', 'differentiable')


@OPTIM_WRAPPERS.register_module()
class FastOptimWrapper(OptimWrapper):
    """mmengine's ``OptimWrapper`` and ``AmpOptimWrapper`` in one, without a wait for the device in a step.

    - Parameter groups with the same settings are updated together: mmengine's constructor makes one group of each
      parameter, and torch launches at least one kernel a group.
    - With ``fused=True`` in the optimizer's config, the loss scale, the factor of clipping and whether the step is
      skipped stay on the device. mmengine reads the gradients' norm, and torch's scaler whether they are finite.
    - The norm is logged as ever (``grad_norm``), and read when the logger logs.

    The numbers are mmengine's up to rounding: one factor divides the gradients where mmengine multiplies them by two.
    Checkpoints and resumed runs are interchangeable with both classes of mmengine. Clipping by value, norms that must
    be finite (``error_if_nonfinite``) and optimizers that are not fused take mmengine's way; with a loss scale the
    host waits there.

    Args:
        optimizer (Optimizer): What it wraps.
        dtype (str, optional): ``float16`` or ``bfloat16`` for automatic mixed precision. Default: None, float32.
        loss_scale (str | float | dict, optional): ``dynamic``, a fixed scale, or the arguments of torch's GradScaler;
            not without ``dtype``. Default: ``dynamic`` for float16, none otherwise.
        accumulative_counts (int): Iterations whose gradients are added up for a step. Default: 1.
        clip_grad (dict, optional): As in mmengine: arguments of ``torch.nn.utils.clip_grad_norm_``, or with
            ``type='value'`` those of ``clip_grad_value_``. Default: None.

    Raises:
        TypeError: If ``loss_scale`` is of another type.
        ValueError: If ``dtype`` or ``loss_scale`` is unknown.

    Examples:
        >>> optim_wrapper = dict(
        ...     type='mmvmamba.FastOptimWrapper',
        ...     dtype='float16',
        ...     optimizer=dict(type='AdamW', lr=1e-3, fused=True),
        ...     clip_grad=dict(max_norm=5.0))
    """

    clip_grad_kwargs: Optional[dict]

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        dtype: Union[str, torch.dtype, None] = None,
        loss_scale: Union[str, float, dict, None] = None,
        accumulative_counts: int = 1,
        clip_grad: Optional[dict] = None,
    ):
        # mmengine's constructor gives groups of its own kind of dict, which takes ten times as long to read
        for i, group in enumerate(optimizer.param_groups):
            if type(group) is not dict:
                optimizer.param_groups[i] = {key: group[key] for key in group}
        super().__init__(optimizer, accumulative_counts, dict(clip_grad) if clip_grad is not None else None)
        self.cast_dtype = _check_dtype(dtype)
        self._fixed_scale = float(loss_scale) if isinstance(loss_scale, (int, float)) else None
        if loss_scale is None and self.cast_dtype == torch.float16:
            loss_scale = 'dynamic'
        self.loss_scaler = _build_scaler(loss_scale, self._device().type)
        if self.loss_scaler is not None and self.cast_dtype is None:
            raise ValueError(f'loss_scale is {loss_scale!r}, expected none in float32; dtype sets mixed precision')
        self._own = type(optimizer).__module__.startswith('torch.optim')
        if self.loss_scaler is not None and not self._is_fused():
            print_log(
                f'{type(optimizer).__name__} is not fused: the host waits for the device at every step; '
                'optim_wrapper.optimizer.fused=True in the config avoids it',
                logger='current',
                level=logging.WARNING,
            )

    def backward(self, loss: torch.Tensor, **kwargs) -> None:
        """Compute gradients of the scaled loss.

        Args:
            loss (Tensor): A scalar.
            **kwargs: Arguments of ``Tensor.backward``.
        """
        if self.loss_scaler is not None:
            loss = self.loss_scaler.scale(loss)
        super().backward(loss, **kwargs)

    def step(self, **kwargs) -> None:
        """Clip and update; with a loss scale skip what is not finite, and update the scale.

        Args:
            **kwargs: Arguments of the optimizer's ``step``.
        """
        clip: Any = self.clip_grad_kwargs
        by_norm = not clip or (self.grad_name == 'grad_norm' and not clip.get('error_if_nonfinite'))
        if self._is_fused() and by_norm:
            self._fused_step(kwargs)
        else:
            self._plain_step(kwargs)

    def _fused_step(self, kwargs: dict) -> None:
        optimizer: Any = self.optimizer
        clip = self.clip_grad_kwargs or {}
        scaler: Any = self.loss_scaler
        gradients = [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        if not gradients or not (clip or scaler):
            self._update(kwargs)
            return
        norm_type = float(clip.get('norm_type', 2.0))
        norm = _total_norm(gradients, norm_type)
        divisor: Any = None
        skipped: Any = None
        if scaler is not None:
            # an infinite or NaN gradient makes the norm so
            skipped = 1.0 - norm.isfinite().float()
            divisor = scaler._scale
            norm = norm / divisor
        if clip:
            factor = (clip['max_norm'] / (norm + 1e-6)).clamp_(max=1.0)
            divisor = factor.reciprocal() if divisor is None else divisor / factor
            pending_history(self.message_hub, f'train/{self.grad_name}').update(norm)
        optimizer.grad_scale, optimizer.found_inf = divisor, skipped
        try:
            self._update(kwargs)
        finally:
            del optimizer.grad_scale, optimizer.found_inf
        if scaler is not None and self._fixed_scale is None:
            torch._amp_update_scale_(
                scaler._scale,
                scaler._growth_tracker,
                skipped,
                scaler.get_growth_factor(),
                scaler.get_backoff_factor(),
                scaler.get_growth_interval(),
            )

    def _plain_step(self, kwargs: dict) -> None:
        scaler: Any = self.loss_scaler
        with self._merged_groups():
            if scaler is None:
                if self.clip_grad_kwargs:
                    self._clip_grad()
                self.optimizer.step(**kwargs)
                return
            if self.clip_grad_kwargs:
                scaler.unscale_(self.optimizer)
                self._clip_grad()
            scaler.step(self.optimizer, **kwargs)
            scaler.update(self._fixed_scale)

    def _clip_grad(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        if parameters:
            norm = self.clip_func(parameters, **(self.clip_grad_kwargs or {}))
            if norm is not None:
                pending_history(self.message_hub, f'train/{self.grad_name}').update(norm)

    def _update(self, kwargs: dict) -> None:
        with self._merged_groups():
            self.optimizer.step(**kwargs)

    @contextlib.contextmanager
    def _merged_groups(self):
        """While it lasts, the optimizer has one group for all parameters with the same settings."""
        if not self._own:  # others may keep state in their groups
            yield
            return
        optimizer = self.optimizer
        groups, settings = optimizer.param_groups, itemgetter(*optimizer.defaults)
        merged: dict = {}
        try:
            for group in groups:
                merged.setdefault(settings(group), []).append(group)
        except (TypeError, KeyError):  # a setting that cannot be compared, such as a list, or is not there
            merged = {i: [group] for i, group in enumerate(groups)}
        optimizer.param_groups = [
            {**same[0], 'params': [p for group in same for p in group['params']]} for same in merged.values()
        ]
        try:
            yield
        finally:
            optimizer.param_groups = groups

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module):
        """mmengine's context of a forward pass: no synchronisation between accumulated iterations; autocast.

        Args:
            model (nn.Module): The model, maybe wrapped.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(super().optim_context(model))
            if self.cast_dtype is not None:
                stack.enter_context(torch.autocast(self._device().type, self.cast_dtype))
            yield

    def state_dict(self) -> dict:
        """The optimizer's state, with that of the loss scale as ``loss_scaler``, if there is one."""
        state = super().state_dict()
        if self.loss_scaler is not None:
            state['loss_scaler'] = self.loss_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state that this class or one of mmengine's saved; it stays as it is.

        Args:
            state_dict (dict): The state. Of another precision, the loss scale begins anew.
        """
        state = dict(state_dict)
        scale = state.pop('loss_scaler', None)
        if scale and self.loss_scaler is not None:
            self.loss_scaler.load_state_dict(scale)
        if 'base_param_settings' in state:
            self.base_param_settings = state.pop('base_param_settings')
        own = self.optimizer.param_groups
        if len(own) == len(state['param_groups']):  # otherwise the optimizer says what is wrong
            means = [{name: group[name] for name in _MEANS if name in group} for group in own]
            state['param_groups'] = [{**group, **mean} for group, mean in zip(state['param_groups'], means)]
        self.optimizer.load_state_dict(state)

    def _is_fused(self) -> bool:
        return bool(getattr(self.optimizer, '_step_supports_amp_scaling', False))

    def _device(self) -> torch.device:
        return self.optimizer.param_groups[0]['params'][0].device


def _check_dtype(dtype) -> Optional[torch.dtype]:
    if dtype in (None, 'float32', torch.float32):
        return None
    if dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f'dtype is {dtype!r}, expected {", ".join(map(repr, DTYPES))} or None')
    return DTYPES[dtype]


def _build_scaler(loss_scale, device: str) -> Optional[torch.amp.GradScaler]:
    if loss_scale is None:
        return None
    if loss_scale == 'dynamic':
        return torch.amp.GradScaler(device)
    if isinstance(loss_scale, dict):
        return torch.amp.GradScaler(device, **loss_scale)
    if isinstance(loss_scale, str):
        raise ValueError(f"loss_scale is {loss_scale!r}, expected 'dynamic', a number or a dict")
    if isinstance(loss_scale, bool) or not isinstance(loss_scale, (int, float)):
        raise TypeError(f"loss_scale is {loss_scale!r}, expected 'dynamic', a number or a dict")
    return torch.amp.GradScaler(device, init_scale=float(loss_scale))


def _total_norm(gradients: list, norm_type: float) -> torch.Tensor:
    """Norm of all gradients together, in float32, on the device of the first."""
    device = gradients[0].device
    norms = torch._foreach_norm(gradients, norm_type)
    if any(norm.dtype != torch.float32 or norm.device != device for norm in norms):
        norms = tuple(norm.to(device, torch.float32) for norm in norms)
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)

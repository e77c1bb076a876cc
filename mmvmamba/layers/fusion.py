"""The one place that decides what a fused pass may take over.

Fusion is an optimisation, never a semantic: a fused pass leaves out the calls of the modules whose formulas it
computes, which nobody notices only if these calls are no more than their formulas.  It asks anew at every forward,
since torch announces no new hook; only the second forward of a checkpointed block does as the first did.
"""

from typing import Any, Optional

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.nn.utils.parametrize import type_before_parametrizations

from mmvmamba.ops import decisions

_KINDS = (nn.Linear, nn.Conv2d, nn.GELU, nn.SiLU, nn.Dropout, nn.Identity)
_FORWARDS: dict = {kind: kind.forward for kind in _KINDS}  # as they were defined, to notice a patch
_CALL = nn.Module.__call__  # what draws a model's graph puts its own in the place of it
_WEIGHTS: set = {nn.Linear, nn.Conv2d}  # kinds whose weight and bias a fused pass reads from outside
# a sharded or functional call puts plain tensors in a parameter's place
_VALUES = (nn.Parameter, type(None), torch.Tensor)


def fusible(kind: Any) -> Any:
    """Class decorator: fused passes may take over modules of exactly this class."""
    _FORWARDS[kind] = kind.forward
    if issubclass(kind, nn.LayerNorm):
        _WEIGHTS.add(kind)
    return kind


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module is no more than the formula of a class.

    It is more for a subclass, such as an adapter or a parametrised layer, with a hook of any kind, the process's global
    ones included, with a ``forward`` of its own (whoever offloads a weight puts it there) or a compiled one, with a
    replaced ``__call__``, and with a weight that is no ordinary tensor, such as a quantised or a distributed one.

    Args:
        module (nn.Module): What may have been put in the place of a module of that class.
        kind (type): ``nn.Linear``, ``nn.Conv2d``, ``nn.GELU``, ``nn.SiLU``, ``nn.Dropout``, ``nn.Identity`` or a class
            that is :func:`fusible`.
    """
    if decisions.active:
        return decisions.decide((id(module), kind), _is_plain, module, kind)
    return _is_plain(module, kind)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    state = module.__dict__
    if (
        type(module) is not kind
        or kind.forward is not _FORWARDS[kind]
        or kind.__call__ is not _CALL
        or state['_forward_hooks']
        or state['_forward_pre_hooks']
        or state['_backward_hooks']
        or state['_backward_pre_hooks']
        or 'forward' in state
        or '_compiled_call_impl' in state
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ):
        return False
    if kind in _WEIGHTS:
        weights = state['_parameters'].values()
        for weight in weights if len(weights) == 2 else (module.weight, module.bias):
            if type(weight) not in _VALUES:
                return False
    return True


def to_last(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to a contiguous (B, H, W, C), a view where ``x`` has ``channels_last`` strides."""
    return x.permute(0, 2, 3, 1).contiguous()


def to_first(x: torch.Tensor) -> torch.Tensor:
    """(B, H, W, C) to its view (B, C, H, W), which has ``channels_last`` strides."""
    return x.permute(0, 3, 1, 2)


def run_last(module: Any, x: torch.Tensor, kind: Optional[type[nn.Module]] = None) -> torch.Tensor:
    """Run a module on a channel-last map, (B, H, W, C) to (B, H', W', C').

    Args:
        module (nn.Module): A plain one of class ``kind`` runs by its method ``channel_last``; torch's own LayerNorm is
            called on ``x``, whose last dimension it normalises; any other module on the view (B, C, H, W).
        x (Tensor): (B, H, W, C).
        kind (type, optional): A :func:`fusible` class with that method. Default: None.
    """
    if kind is not None and is_plain(module, kind):
        return module.channel_last(x)
    if isinstance(module, nn.LayerNorm) and type_before_parametrizations(module) is nn.LayerNorm:
        return module(x)
    return to_last(module(to_first(x)))

"""How the stand-ins compute: outside autograd and autocast, in float32 at least."""

import functools

import torch


def plain(function):
    """Run an op without autograd and autocast: mmcv calls it inside autograd functions of its own."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        device = next(iter((*args, *kwargs.values()))).device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return call


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, if it is float16 or bfloat16; the result is rounded once, by the copy to its buffer."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def at_most(count: int, size: int) -> int:
    """How many of ``count`` items of ``size`` elements each are computed at a time, to bound the memory."""
    return max(1, min(count, 2**24 // max(size, 1)))

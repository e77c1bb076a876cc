"""The ops ``mmvmamba::cross_scan`` and ``cross_merge`` and their Triton forms; scan modes are places in SCAN_MODES."""

import torch

from ..registration import define, define_triton
from .routes import ROUTES

SCAN_MODES = tuple(ROUTES)


def _fake_scan(x, scan_mode, channel_last):
    if channel_last:
        batch, height, width, channels = x.shape
        return x.new_empty((batch, height * width, 4, channels))
    batch, channels, height, width = x.shape
    return x.new_empty((batch, 4, channels, height * width))


def _fake_merge(y, height, width, scan_mode, channel_last):
    if channel_last:
        return y.new_empty((y.shape[0], height, width, y.shape[3]))
    return y.new_empty((y.shape[0], y.shape[2], height, width))


# ---- Triton ---------------------------------------------------------------------------------------------------------
def _run_scan(*arguments):
    from . import triton

    return triton.cross_scan(*arguments)


def _run_merge(*arguments):
    from . import triton

    return triton.cross_merge(*arguments)


def _save_scan(ctx, arguments, _):
    x, ctx.scan_mode, ctx.channel_last = arguments
    ctx.size = x.shape[1:3] if ctx.channel_last else x.shape[2:4]


def _differentiate_scan(ctx, dy):
    return (torch.ops.mmvmamba.cross_merge_triton(dy, *ctx.size, ctx.scan_mode, ctx.channel_last),)


def _save_merge(ctx, arguments, _):
    *_, ctx.scan_mode, ctx.channel_last = arguments


def _differentiate_merge(ctx, dx):
    return (torch.ops.mmvmamba.cross_scan_triton(dx, ctx.scan_mode, ctx.channel_last),)


define(__file__, ('naive', 'cpu', 'triton', 'cuda'), cross_scan=_fake_scan, cross_merge=_fake_merge)
define_triton(
    __file__, 'cross_scan', run=_run_scan, fake=_fake_scan, save=_save_scan, differentiate=_differentiate_scan
)
define_triton(
    __file__, 'cross_merge', run=_run_merge, fake=_fake_merge, save=_save_merge, differentiate=_differentiate_merge
)

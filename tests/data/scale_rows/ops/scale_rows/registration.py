"""The op ``mmvmamba::scale_rows``: fake kernels, and its Triton form."""

import torch

from ..registration import define, define_triton


def _fake(x, factors):
    return x.new_empty(x.shape)


def _fake_backward(dy, x, factors):
    return x.new_empty(x.shape), factors.new_empty(factors.shape)


def _run(*arguments):
    from . import triton

    return triton.scale_rows(*arguments)


def _run_backward(*arguments):
    from . import triton

    return triton.scale_rows_backward(*arguments)


def _save(ctx, arguments, _):
    ctx.save_for_backward(*arguments)


def _differentiate(ctx, dy):
    return torch.ops.mmvmamba.scale_rows_triton_backward(dy, *ctx.saved_tensors)


define(__file__, ('naive', 'cpu', 'triton'), scale_rows=_fake, scale_rows_backward=_fake_backward)
define_triton(
    __file__,
    'scale_rows',
    run=_run,
    fake=_fake,
    run_backward=_run_backward,
    fake_backward=_fake_backward,
    save=_save,
    differentiate=_differentiate,
)

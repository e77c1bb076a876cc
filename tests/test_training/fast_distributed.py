"""Four steps by one process and by two, on CPU: ``fast_distributed.py OUT``; saves weights to OUT.1 and OUT.2.

The two train as the mixed-precision configs do: a compiled backbone, gradients in the buckets, the fused step
with clipping, foreach averages; gradients of two iterations are accumulated.
"""

import sys
from functools import partial

import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper

from mmvmamba import ForeachEMA
from mmvmamba.training.compiling import compile_modules
from tests.test_training.distributed import Model, fork, images


def train(rank: int, world: int) -> dict:
    """Weights and averages after four steps of four images, two each of two processes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = inner = Model()
    average = ForeachEMA(model, 0.1)
    if world > 1:
        compile_modules(model, ['backbone'], backend='eager')
        model = MMDistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = dict(type='AdamW', lr=1e-2, weight_decay=0.05, fused=world > 1)
    kind = 'mmvmamba.FastOptimWrapper' if world > 1 else 'OptimWrapper'
    wrapper = build_optim_wrapper(
        model,
        dict(
            type=kind,
            optimizer=optimizer,
            clip_grad=dict(max_norm=0.1),
            paramwise_cfg=dict(bias_decay_mult=0),
            accumulative_counts=2,
        ),
    )
    count = 4 // world
    for step in range(4):
        with wrapper.optim_context(model):
            loss = model(images(step, rank * count, count)).mean()
        wrapper.update_params(loss)
        average.update_parameters(inner)
    return dict(weights=inner.state_dict(), average=average.module.state_dict())


if __name__ == '__main__':
    for processes in (1, 2):
        fork(f'{sys.argv[1]}.{processes}', processes, partial(train, world=processes))

"""A small training: ``distributed.py OUT BATCHES PROCESSES`` by one process and by several, on CPU.

BATCHES is the number of images of each process in each step, joined by ``+`` and steps by ``,``: ``2+2,3+1``. Saves
losses and gradients of rank 0, by dtype, to OUT.1 and OUT.PROCESSES. With ``cuda`` in the place of PROCESSES the second
is one process on the GPU, in float32. As one process of torch.distributed.run, with ``die`` there, the last process
dies in the second step.
"""

import os
import sys
import time
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel

from mmvmamba.models import VSSMBackbone

DTYPES = dict(float64=torch.float64, float32=torch.float32)


class Model(torch.nn.Module):
    """A backbone, and a fixed weighting of its maps; their squares would be constant, the maps being normalised."""

    def __init__(self):
        super().__init__()
        self.backbone = VSSMBackbone(dict(dims=8, depths=(1, 1)), out_indices=(0, 1))

    def forward(self, x):
        outs = [out.flatten(1) for out in self.backbone(x)]
        return sum((out * torch.linspace(-1, 1, out.shape[1]).to(out)).sum(1) for out in outs)


def images(step: int, first: int, count: int) -> torch.Tensor:
    """Images of a step by their place in the whole batch."""
    make = lambda i: torch.Generator().manual_seed(1000 * step + i)  # noqa: E731
    return torch.stack([torch.rand(3, 20, 28, generator=make(i)) for i in range(first, first + count)])


def train(
    out: str, batches: str, rank: int, world: int, dtype: torch.dtype, fault: str = '', device: str = 'cpu'
) -> list:
    """Losses and gradients of each step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Model().to(device, dtype)
    if world > 1:
        model = MMDistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    results = []
    for step, sizes in enumerate(batches.split(',')):
        sizes = [int(size) for size in sizes.split('+')]
        own = sizes if world == 1 else [sizes[rank]]
        first = 0 if world == 1 else sum(sizes[:rank])
        if fault == 'die' and step == 1 and rank == world - 1:
            Path(f'{out}.died').write_text(str(time.time()))
            os._exit(7)
        optimizer.zero_grad()
        # a process without images takes part with a loss of zero, as a detector without boxes does
        loss = model(images(step, first, max(sum(own), 1)).to(device, dtype))
        loss = loss.sum() * (1 if sum(own) else 0) / sum(sizes)
        (loss * world).backward()  # DistributedDataParallel averages over processes
        total = loss.detach().cpu().clone()
        if world > 1:
            dist.all_reduce(total)
        optimizer.step()
        inner = model.module if world > 1 else model
        results.append((total, {name: p.grad.cpu().clone() for name, p in inner.named_parameters()}))
    return results


def fork(out: str, world: int, work) -> None:
    """Let forked processes, which share the slow imports, do some work each; save what ``work(rank)`` of rank 0 gives.

    Args:
        out (str): File for the result.
        world (int): Number of processes, a process group if there are several.
        work (Callable): Function of the rank.
    """
    children = []
    for rank in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                if world > 1:
                    dist.init_process_group(
                        'gloo', f'file://{out}.store', rank=rank, world_size=world, timeout=timedelta(seconds=120)
                    )
                result = work(rank)
                if rank == 0:
                    torch.save(result, out)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)


def main(out: str, batches: str, argument: str) -> None:
    if 'RANK' in os.environ:
        dist.init_process_group('gloo', timeout=timedelta(seconds=30))
        train(out, batches, dist.get_rank(), dist.get_world_size(), torch.float32, argument)
        raise AssertionError('the run went on although a process died')

    def work(rank, world, device='cpu'):
        dtypes = DTYPES if device == 'cpu' else dict(float32=torch.float32)
        return {name: train(out, batches, rank, world, dtype, device=device) for name, dtype in dtypes.items()}

    fork(f'{out}.1', 1, partial(work, world=1))
    if argument == 'cuda':  # which a fork of this process may not use
        torch.backends.cudnn.allow_tf32 = False
        torch.save(work(0, 1, 'cuda'), f'{out}.cuda')
    else:
        fork(f'{out}.{argument}', int(argument), partial(work, world=int(argument)))


if __name__ == '__main__':
    main(*sys.argv[1:])

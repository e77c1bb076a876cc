"""Random numbers that do not depend on interruptions of a run."""

import os
import random

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from mmvmamba.registry import register_hook


@register_hook
class ExactResumeHook(Hook):
    """Draw each epoch's (or, in training by iterations, each iteration's) random numbers from seed, process and count.

    mmengine saves weights and optimizer but no random state: a resumed run augments and drops other things than one
    that was never interrupted. With this hook and ``randomness=dict(seed=..., deterministic=True)`` both end with the
    same parameters, bit for bit. Training by epochs restarts the data-loader workers each epoch, also persistent ones.
    cuBLAS gets the workspace without which torch refuses deterministic runs on a GPU (``CUBLAS_WORKSPACE_CONFIG``),
    unless the environment chooses one.

    Raises:
        ValueError: If training goes by iterations without data-loader workers; images are then augmented from the same
            random state that the model draws from, which can't be wound forward.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner) -> None:
        if torch.are_deterministic_algorithms_enabled():
            os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read at the first product

    def before_train(self, runner) -> None:
        self.by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        loader = runner.train_dataloader
        if self.by_epoch:
            loader.worker_init_fn = seed_worker
        elif loader.num_workers == 0:
            raise ValueError(
                'ExactResumeHook: train_dataloader.num_workers is 0, expected at least 1 to train by iterations'
            )

    def before_train_epoch(self, runner) -> None:
        if self.by_epoch:
            seed_process(runner.seed, get_rank(), runner.epoch)
            runner.train_dataloader._iterator = None  # persistent workers would go on where they are

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if not self.by_epoch:
            seed_process(runner.seed, get_rank(), runner.iter)


def seed_process(*numbers: int) -> None:
    """Seed Python, NumPy and torch (with its GPUs) from a few numbers."""
    first, second, third = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(first))
    np.random.seed(second)
    torch.manual_seed(int(third))


def seed_worker(worker_id: int) -> None:
    """Seed Python and NumPy in a data-loader worker; torch's seed there comes from the process that started it."""
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)

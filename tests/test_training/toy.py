"""The smallest run of mmengine's Runner: four numbers a sample, two layers, a few iterations; and an evil pickle."""

import uuid

import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset


class Numbers(Dataset):
    """Sixteen samples of four numbers."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return dict(inputs=torch.full((4,), index / 16.0), labels=torch.tensor(float(index % 2)))


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


class Toy(BaseModel):
    """Two linear layers with dropout, and places to make a number bad; ``norm`` adds running averages."""

    def __init__(self, norm=False):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.dropout = nn.Dropout(0.5)
        self.exponential = Exponential()
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.last = nn.Linear(8, 1)
        self.fault = {}  # iteration -> function of the hidden values
        self.calls = 0

    def forward(self, inputs, labels, mode='tensor'):
        x = torch.stack(list(inputs)) if isinstance(inputs, (list, tuple)) else inputs
        x = self.dropout(self.first(x))
        if mode == 'loss' and self.calls in self.fault:
            x = self.fault[self.calls](x)
        out = self.last(self.norm(self.exponential(x))).squeeze(1)
        if mode == 'loss':
            return dict(loss=(out - torch.as_tensor(labels)).square().mean())
        return out

    def train_step(self, data, optim_wrapper):
        result = super().train_step(data, optim_wrapper)
        self.calls += 1
        return result


class Score:
    """A metric that has a given value after each epoch, or after each iteration in training by iterations."""

    def __init__(self, values, runner):
        self.values, self.runner = list(values), runner
        self.dataset_meta = None

    def process(self, data_samples, data_batch=None):
        pass

    def offline_evaluate(self, *_):
        raise NotImplementedError

    def evaluate(self, size):
        return dict(score=self.values[(self.runner.epoch or self.runner.iter) - 1])


def make_runner(
    work_dir, epochs=2, hooks=(), checkpoint=None, scores=(), resume=False, load_from=None, by_iter=False, norm=False
):
    """A Runner of a :class:`Toy`; ``checkpoint`` holds options of the checkpoint hook."""
    loader = dict(
        dataset=Numbers(),
        batch_size=8,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='default_collate'),
    )
    validation = {}
    if scores:
        validation = dict(
            val_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=False)),
            val_cfg=dict(),
            val_evaluator=[],
        )
    runner = Runner(
        model=Toy(norm),
        work_dir=str(work_dir),
        experiment_name=f'toy-{uuid.uuid4()}',  # mmengine keeps a message hub for each name
        train_dataloader=loader,
        train_cfg=dict(by_epoch=False, max_iters=epochs, val_interval=1)
        if by_iter
        else dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        default_hooks=dict(checkpoint=dict(type='mmvmamba.AtomicCheckpointHook', interval=1, **(checkpoint or {}))),
        custom_hooks=list(hooks),
        randomness=dict(seed=0),
        resume=resume,
        load_from=None if load_from is None else str(load_from),
        log_level='WARNING',
        **validation,
    )
    if scores:
        runner.val_loop  # noqa: B018  (built when it is asked for)
        runner.val_loop.evaluator = Score(scores, runner)
        runner.model.val_step = lambda data: [0]
    return runner


class Writes:
    """A pickle that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), 'w'))

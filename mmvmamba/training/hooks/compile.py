"""A config's switch for compiling."""

import logging
from typing import Optional, Sequence

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper

from mmvmamba.registry import register_hook
from mmvmamba.training.compiling import GRAPHED, compile_modules, restore_modules

_SHAPES = 4  # training and validation, and the last batch of each


@register_hook
class CompileHook(Hook):
    """Run the backbone compiled, in training and in validation: ``dict(type='mmvmamba.CompileHook')``.

    mmengine's ``compile=True`` compiles ``train_step`` with the optimizer and its contexts, which torch cannot follow.
    Here only modules whose inputs are tensors are compiled. Names of weights, checkpoints and resuming are as without,
    and so are hooks of the modules, ``with_cp`` and DistributedDataParallel. Where compiling fails, such as without a
    C++ compiler, one warning says why and the run goes on without.

    The first iterations take minutes. With fixed shapes the first four shapes are compiled (training, validation, and
    the last batch of each); all others run as they are.

    Args:
        modules (Sequence[str]): Names of modules of the model. A head's ``forward`` can be compiled where it takes and
            gives tensors: ``decode_head`` of mmseg. Default: ('backbone',).
        dynamic (bool): Whether shapes change, as in detection: one graph serves them all. Default: False.
        mode (str, optional): That of ``torch.compile``. ``reduce-overhead`` replays CUDA graphs: the host launches
            an iteration in a few calls. Not with ``dynamic``. Under gradient accumulation it runs as None and says so,
            since a graph overwrites the gradients of the iteration before. Default: None.
        backend (str): That of ``torch.compile``. Default: ``inductor``.
        enable (bool): False for a run as if there were no such hook. Default: True.

    Raises:
        TypeError: If ``modules`` is not a sequence of names.
        ValueError: If CUDA graphs are asked for with ``dynamic``, or if the model has no such module.
    """

    priority = 'LOW'

    def __init__(
        self,
        modules: Sequence[str] = ('backbone',),
        dynamic: bool = False,
        mode: Optional[str] = None,
        backend: str = 'inductor',
        enable: bool = True,
    ):
        if isinstance(modules, str) or not all(isinstance(name, str) for name in modules):
            raise TypeError(f"modules is {modules!r}, expected names of modules such as ('backbone',)")
        if dynamic and mode in GRAPHED:
            raise ValueError(f'mode is {mode!r} with dynamic=True, expected None: CUDA graphs hold for one shape')
        self.modules, self.dynamic, self.mode, self.backend = tuple(modules), dynamic, mode, backend
        self.enable, self.graphed = enable, False
        self._compiled: list = []

    def before_train(self, runner) -> None:
        if not self.enable:
            return
        mode = self._mode_for(runner.optim_wrapper)
        self.graphed = mode in GRAPHED and self.backend == 'inductor'
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        options = dict(dynamic=self.dynamic, backend=self.backend)
        if mode is not None:
            options['mode'] = mode
        shapes = None if self.dynamic else _SHAPES
        self._compiled = compile_modules(model, self.modules, shapes, **options)
        print_log(
            f'{", ".join(self.modules)} will be compiled, {"for all shapes" if self.dynamic else "shape by shape"}: '
            'the first iterations take minutes',
            logger='current',
        )

    def _mode_for(self, optim_wrapper) -> Optional[str]:
        count = getattr(optim_wrapper, '_accumulative_counts', 1)
        if self.mode not in GRAPHED or count == 1:
            return self.mode
        print_log(
            f'mode={self.mode!r} is left out with accumulative_counts={count}: '
            'a CUDA graph overwrites the gradients of the iteration before',
            logger='current',
            level=logging.WARNING,
        )
        return None

    def _before_iter(self, runner, batch_idx, data_batch=None, mode='train') -> None:
        if self.graphed and self._compiled:
            torch.compiler.cudagraph_mark_step_begin()

    def after_train(self, runner) -> None:
        restore_modules(compiled.module for compiled in self._compiled)
        self._compiled = []

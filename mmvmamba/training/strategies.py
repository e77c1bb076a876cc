"""Strategies of mmengine's FlexibleRunner: how a model is spread over processes."""

import functools

import torch
from mmengine._strategy import FSDPStrategy as MMEngineFSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from mmvmamba.layers import VSSBlock
from mmvmamba.layers.downsample import PatchMerging, StridedConv
from mmvmamba.registry import STRATEGIES

GATHERED = {VSSBlock, PatchMerging, StridedConv}
OPTIMIZER = ('state', 'param_groups')  # the optimizer's own in the state of its wrapper


@STRATEGIES.register_module()
class FSDPStrategy(MMEngineFSDPStrategy):
    """mmengine's ``FSDPStrategy``, whose runs can be resumed, and also run on a CPU.

    - mmengine 0.10 hands the arguments of ``optim_state_dict_to_load`` over in the order that torch had before 2.1,
      which ends every ``--resume`` in a ``TypeError``.
    - It drops the scale of the loss from a checkpoint, so that mixed precision starts over with the first one.
    - Checkpoints are whole files by default (``state_dict_cfg='full'``), which test and fine-tune like any other.
    - What is gathered together is a block or a downsampling by default: their ops take weights from several modules.

    Arguments are those of mmengine's.
    """

    model_wrapper: dict

    def __init__(self, *, state_dict_cfg='full', **kwargs):
        super().__init__(state_dict_cfg=state_dict_cfg, **kwargs)
        if not torch.cuda.is_available():  # nothing to offload; torch 2.11 crashes when it is asked to
            for config in (self.state_dict_config, self.optim_state_dict_config):
                config.offload_to_cpu = False

    def _wrap_model(self, model):
        blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=GATHERED)
        wrapper = dict(type='MMFullyShardedDataParallel', auto_wrap_policy=blocks, use_orig_params=True)
        if not torch.cuda.is_available():
            wrapper['device_id'] = 'cpu'
        self.model_wrapper = {**wrapper, **(self.model_wrapper or {})}
        return super()._wrap_model(model)

    def optim_state_dict(self) -> dict:
        """The optimizer's state by parameter names, and what its wrapper keeps, such as the scale of the loss."""
        state = FullyShardedDataParallel.optim_state_dict(self.model, self.optim_wrapper.optimizer)
        return {**self.optim_wrapper.state_dict(), **dict.fromkeys(OPTIMIZER), **state}

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load what :meth:`optim_state_dict` returned into the shards of this process.

        Args:
            state_dict (dict): The state; it is not changed.
        """
        state = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model,
            optim=self.optim_wrapper.optimizer,
            optim_state_dict={key: state_dict[key] for key in OPTIMIZER},
        )
        self.optim_wrapper.load_state_dict({**state_dict, **state})

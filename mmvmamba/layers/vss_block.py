"""VSSBlock: SS2D and MLP, each with a norm and a residual connection."""

from typing import Optional

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .drop_path import DropPath
from .mlp import Mlp
from .norm import add_residual, build_norm
from .options import SS2DOptions
from .ss2d import SS2D


class VSSBlock(nn.Module):
    """Block of VMamba, figure 3 of `VMamba <https://arxiv.org/abs/2401.10166>`_, (B, H, W, C) to (B, H, W, C).

    Args:
        channels (int): C.
        ssm (SS2DOptions): Options of the token mixer.
        mlp (str): ``mlp`` or ``gmlp``. Default: ``mlp``.
        mlp_ratio (float): Width of the MLP over C; 0 for a block without MLP. Default: 4.
        mlp_act (str): Activation of the MLP. Default: ``gelu``.
        mlp_dropout (float): Dropout in the MLP. Default: 0.
        drop_path (float): Probability to drop a residual branch for an image. Default: 0.
        norm_layer (str): ``ln``, ``ln2d`` or ``bn``. Default: ``ln2d``.
        with_cp (bool): Whether to recompute activations in backward to save memory. Default: False.
    """

    def __init__(
        self,
        channels: int,
        ssm: SS2DOptions,
        mlp: str = 'mlp',
        mlp_ratio: float = 4.0,
        mlp_act: str = 'gelu',
        mlp_dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: str = 'ln2d',
        with_cp: bool = False,
    ):
        super().__init__()
        self.with_cp = with_cp
        self.norm = build_norm(norm_layer, channels, autocast_output=True)
        self.op = SS2D(channels, ssm)
        self.drop_path = DropPath(drop_path)
        self.has_mlp = mlp_ratio > 0
        if self.has_mlp:
            self.norm2 = build_norm(norm_layer, channels, autocast_output=True)
            self.mlp = Mlp(channels, int(mlp_ratio * channels), mlp_act, mlp_dropout, gated=mlp == 'gmlp')

    def forward(self, x: torch.Tensor, pending: Optional[tuple] = None, last: bool = True):
        """Run the block.

        Args:
            x (Tensor): (B, H, W, C).
            pending (tuple, optional): A branch (B, H, W, C) that is still to be added to ``x``, and its factors (B,)
                or None. Default: None.
            last (bool): Whether to add this block's own last branch too, instead of leaving it to the norm of the
                next block, which does so in the same pass. Default: True.

        Returns:
            Tensor | tuple: The map; or, unless ``last``, the map and the branch pending.
        """
        if self.with_cp and torch.is_grad_enabled() and (x.requires_grad or self.training):
            return checkpoint(self._forward, x, pending, last, use_reentrant=False)
        return self._forward(x, pending, last)

    def _forward(self, x, pending, last):
        x, y = (x, self.norm(x)) if pending is None else self.norm(x, *pending)
        factors = self.drop_path(x, 2 if self.has_mlp else 1)
        pending = self.op(y), factors[0]
        if self.has_mlp:
            x, y = self.norm2(x, *pending)
            pending = self.mlp(y), factors[1]
        return add_residual(x, *pending) if last else (x, pending)


class BlockSequence(nn.Sequential):
    """The blocks of a stage, (B, H, W, C) to (B, H, W, C); each adds the last branch of the block before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pending = None
        *blocks, final = self
        for block in blocks:
            # a checkpointed block keeps its inputs: one map rather than two
            x, pending = (block(x, pending), None) if block.with_cp else block(x, pending, last=False)
        return final(x, pending)

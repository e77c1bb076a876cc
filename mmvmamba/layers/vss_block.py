"""VSSBlock: SS2D and MLP, each with a norm and a residual connection."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmvmamba.ops.decisions import repeatable

from .drop_path import DropPath
from .fusion import fusible
from .mlp import Mlp
from .norm import build_norm, normalise
from .options import SS2DOptions
from .ss2d import SS2D


@fusible
class VSSBlock(nn.Module):
    """Block of VMamba, figure 3 of `VMamba <https://arxiv.org/abs/2401.10166>`_, (B, C, H, W) to (B, C, H, W).

    x = x + drop_path(op(norm(x))), then x = x + drop_path(mlp(norm2(x))); with ``post_norm`` norm(op(x)) and
    norm2(mlp(x)).  A block has one of the two branches, or both.

    Args:
        channels (int): C.
        ssm (SS2DOptions): Options of the token mixer; ``ssm_ratio`` 0 for a block without it.
        mlp (str): ``mlp`` or ``gmlp``. Default: ``mlp``.
        mlp_ratio (float): Width of the MLP over C; 0 for a block without MLP. Default: 4.
        mlp_act (str): Activation of the MLP. Default: ``gelu``.
        mlp_dropout (float): Dropout in the MLP. Default: 0.
        drop_path (float): Probability to drop a residual branch for an image. Default: 0.
        norm_layer (str): ``ln``, ``ln2d`` or ``bn``. Default: ``ln2d``.
        with_cp (bool): Whether to recompute activations in backward to save memory. Default: False.
        post_norm (bool): Whether a norm follows its branch rather than precede it. Default: False.
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
        post_norm: bool = False,
    ):
        super().__init__()
        if with_cp and ssm.with_initial_state:
            raise ValueError(
                'with_cp is True, expected False with_initial_state: a repeated call would change the state'
            )
        self.with_cp, self.post_norm = with_cp, post_norm
        self.has_ssm, self.has_mlp = ssm.ssm_ratio > 0, mlp_ratio > 0
        if self.has_ssm:
            self.norm = build_norm(norm_layer, channels, autocast_output=not post_norm)
            self.op = SS2D(channels, ssm)
        self.drop_path = DropPath(drop_path)
        if self.has_mlp:
            self.norm2 = build_norm(norm_layer, channels, autocast_output=not post_norm)
            self.mlp = Mlp(channels, int(mlp_ratio * channels), mlp_act, mlp_dropout, gated=mlp == 'gmlp')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recomputes(x):
            return checkpoint(repeatable(self._residuals), x, use_reentrant=False)
        return self._residuals(x)

    def recomputes(self, x: torch.Tensor) -> bool:
        """Whether the activations for ``x`` are computed again in backward."""
        return self.with_cp and torch.is_grad_enabled() and (x.requires_grad or self.training)

    def _residuals(self, x):
        for norm, mixer, _ in self.branches():
            y = normalise(norm, mixer(x)) if self.post_norm else mixer(normalise(norm, x))
            x = x + self.drop_path(y)
        return x

    def branches(self) -> list:
        """Norm, mixer and the mixer's class of each residual branch, in their order."""
        scan: list = [(self.norm, self.op, SS2D)] if self.has_ssm else []
        return scan + [(self.norm2, self.mlp, Mlp)] if self.has_mlp else scan

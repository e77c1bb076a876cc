"""A stage: blocks at one resolution, whose residual sums are fused into the norms."""

from typing import Any, Optional

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmvmamba.ops.decisions import repeatable

from .drop_path import DropPath
from .fusion import is_plain, run_last, to_first, to_last
from .norm import LayerNorm
from .vss_block import VSSBlock


class Stage(nn.Module):
    """The blocks of a stage, (B, C, H, W) to (B, C, H, W), and what leads to the next one.

    The backbone calls ``downsample`` itself, after it has taken the stage's map.

    Args:
        blocks (list[nn.Module]): Modules from (B, C, H, W) to (B, C, H, W).
        downsample (nn.Module): (B, C, H, W) to (B, C_out, H / 2, W / 2), an Identity after the last stage and where
            stages keep the resolution.
    """

    def __init__(self, blocks: list, downsample: nn.Module):
        super().__init__()
        self.blocks = BlockSequence(*blocks)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class BlockSequence(nn.Sequential):
    """Blocks one after the other, (B, C, H, W) to (B, C, H, W).

    A block ends by adding a branch to the map, and the next one begins by normalising the sum.  One kernel does both,
    so the fused order is Add -> Norm -> Mixer: a plain VSSBlock hands its last branch on, and the next norm adds it.
    Any other module in the sequence is called on the finished map, and so is any part of a VSSBlock that is not plain.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block: Any
        pending: Optional[tuple]
        x, pending = to_last(x), None
        for block in self:
            if not is_plain(block, VSSBlock):
                x, pending = to_last(block(to_first(_add(x, pending)))), None
            elif block.recomputes(x):
                # a checkpointed block keeps its inputs: one map rather than two
                x, pending = checkpoint(repeatable(_run_whole), block, _add(x, pending), use_reentrant=False), None
            else:
                x, pending = _run(block, x, pending)
        return to_first(_add(x, pending))


def _run(block: Any, x: torch.Tensor, pending: Optional[tuple]) -> tuple:
    """The two equations of a block in the fused order.

    Args:
        block (VSSBlock): A plain block.
        x (Tensor): (B, H, W, C).
        pending (tuple, optional): A branch (B, H, W, C) that is still to be added to ``x``, and its factors (B,) or
            None.

    Returns:
        tuple: The map, and the block's own last branch pending.
    """
    drop_path, branches = block.drop_path, block.branches()
    plain_drop = is_plain(drop_path, DropPath)
    factors = drop_path.draw(x, len(branches)) if plain_drop else (None,) * len(branches)
    for (norm, mixer, kind), factor in zip(branches, factors):
        if block.post_norm:
            x = y = _add(x, pending)
        else:
            x, y = _add_and_normalise(norm, x, pending)
        y = run_last(mixer, y, kind)
        if block.post_norm:
            y = run_last(norm, y, LayerNorm)
        if not plain_drop:
            y = run_last(drop_path, y)
        pending = (y if y.shape == x.shape else y.expand_as(x)), factor
    return x, pending


def _run_whole(block: VSSBlock, x: torch.Tensor) -> torch.Tensor:
    return _add(*_run(block, x, None))


def _add_and_normalise(norm: Any, x: torch.Tensor, pending: Optional[tuple]) -> tuple:
    if pending is None:
        return x, run_last(norm, x, LayerNorm)
    if is_plain(norm, LayerNorm):
        return norm.of_sum(x, *pending)
    x = _add(x, pending)
    return x, run_last(norm, x)


def _add(x: torch.Tensor, pending: Optional[tuple]) -> torch.Tensor:
    """``x + factors * branch``, maps (B, H, W, C) and factors (B,)."""
    if pending is None:
        return x
    branch, factors = pending
    return x + (branch if factors is None else branch * factors.to(branch.dtype).view(-1, 1, 1, 1))

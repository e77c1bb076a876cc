"""Softmax attention of a vision transformer, to stand beside the scan's: DeiT, as in VMamba's paper, or any ViT.

The model is read by the names of mmpretrain's ``VisionTransformer``, which this package does not import:
``patch_embed`` returns tokens and their grid, and ``layers`` hold ``attn`` with ``qkv`` and ``proj``.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class VitAttention:
    """How the tokens of an image read each other in one layer, all in float64.

    Attributes:
        layer (int): The layer, from 0.
        grid (tuple[int, int]): Rows and columns of the patches.
        scores (Tensor): Scaled products of queries and keys, (heads, T, T); extra tokens come before the patches.
        values (Tensor): What is read, (heads, T, channels of a head).
        output (Tensor): What the layer's projection got, (T, heads * channels of a head).
    """

    layer: int
    grid: tuple
    scores: torch.Tensor
    values: torch.Tensor
    output: torch.Tensor

    @property
    def weights(self) -> torch.Tensor:
        """Attention of every token, (heads, T, T): scores through softmax."""
        return self.scores.softmax(dim=-1)

    def error(self) -> float:
        """Largest difference between weights times values and what was projected, relative to the largest of it."""
        read = (self.weights @ self.values).transpose(0, 1).flatten(1)
        return float((read - self.output).abs().max() / self.output.abs().max())

    def of_patch(self, row: int, column: int) -> tuple:
        """How one patch reads all patches, means over heads; what it reads of extra tokens is left out.

        Args:
            row (int): Row of the patch in the grid.
            column (int): Its column.

        Returns:
            tuple[Tensor, Tensor]: Weights and scores, (rows, columns) each.
        """
        rows, columns = self.grid
        extra = self.scores.shape[-1] - rows * columns
        token = extra + row * columns + column
        weights, scores = (each[:, token, extra:].mean(dim=0) for each in (self.weights, self.scores))
        return weights.view(rows, columns), scores.view(rows, columns)


@torch.no_grad()
def vit_attention(backbone: Any, layer: int, x: torch.Tensor) -> VitAttention:
    """Attention of an image in one layer of a vision transformer.

    A hook takes the layer's input, and a float64 copy of its attention runs on it again.

    Args:
        backbone (nn.Module): A ``VisionTransformer`` of mmpretrain or one of its kind, in eval mode.
        layer (int): The layer, from the end if negative.
        x (Tensor): One image, (1, channels, H, W).

    Returns:
        VitAttention: Scores, weights and values.

    Raises:
        ValueError: If the backbone has no such attention, or no such layer.
    """
    layers = getattr(backbone, 'layers', ())
    known = hasattr(backbone, 'patch_embed') and all(_is_attention(getattr(one, 'attn', None)) for one in layers)
    if not (layers and known):
        raise ValueError(f'the backbone is a {type(backbone).__name__}, expected a VisionTransformer')
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f'layer is {layer}, expected 0 to {len(layers) - 1}')
    attention, seen = layers[layer].attn, dict[str, Any]()
    handles = [
        backbone.patch_embed.register_forward_hook(lambda _module, _inputs, output: seen.update(grid=output[1])),
        attention.register_forward_pre_hook(lambda _module, inputs: seen.update(tokens=inputs[0])),
    ]
    try:
        backbone(x)
    finally:
        for handle in handles:
            handle.remove()

    double = copy.deepcopy(attention).double()
    double.proj.register_forward_pre_hook(lambda _module, inputs: seen.update(output=inputs[0][0]))
    tokens = seen['tokens'].double()
    double(tokens)
    query, key, values = double.qkv(tokens)[0].unflatten(1, (3, double.num_heads, -1)).permute(1, 2, 0, 3)
    # mmpretrain divides by what it calls the scale, if a config sets one
    given = getattr(double.scaled_dot_product_attention, 'keywords', {}).get('scale')
    scores = query @ key.transpose(-2, -1) / (given or query.shape[-1] ** 0.5)
    return VitAttention(range(len(layers))[layer], tuple(map(int, seen['grid'])), scores, values, seen['output'])


def _is_attention(module) -> bool:
    return all(hasattr(module, name) for name in ('qkv', 'proj', 'num_heads', 'scaled_dot_product_attention'))

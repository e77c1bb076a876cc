"""The fused core in the place of a copied layer's ``forward_core``."""

from dataclasses import dataclass, field
from typing import Any, Optional

import torch

from mmvmamba.ops import ss2d_scan

# where the channels are in what a core gets or gives, by the sizes of the dimensions
LAYOUTS = ('BDHW', 'BHWD', 'BDL', 'BLD')


def layout_of(shape, batch: int, channels: int, height: int, width: int) -> Optional[str]:
    """The layout in :data:`LAYOUTS` that a shape has; None for another."""
    sizes = dict(B=batch, D=channels, H=height, W=width, L=height * width)
    return next((layout for layout in LAYOUTS if tuple(shape) == tuple(sizes[dim] for dim in layout)), None)


def to_layout(y: torch.Tensor, layout: str) -> torch.Tensor:
    """A map (B, D, H, W) in another layout."""
    y = y if layout in ('BDHW', 'BHWD') else y.flatten(2)
    return {'BHWD': lambda: y.permute(0, 2, 3, 1), 'BLD': lambda: y.transpose(1, 2)}.get(layout, lambda: y)()


def parameter_of(layer, name: str) -> Any:
    """A parameter by its published name, such as ``x_proj_weight``, or that of a module, ``x_proj.weight``; or None."""
    value = getattr(layer, name, None)
    if value is None:
        module, _, kind = name.rpartition('_')
        value = getattr(getattr(layer, module, None), kind, None)
    return value if isinstance(value, torch.Tensor) else None


@dataclass(eq=False)
class FusedCore:
    """Calls :func:`mmvmamba.ops.ss2d_scan` with a layer's parameters.

    Attributes:
        layer (nn.Module): The layer, which has the published names of the parameters, see :func:`parameter_of`.
        gets (str): Layout of the input.
        gives (str): Layout of the output; ``routes`` for four tensors (B, D, L) that the layer adds up, of which the
            first is then the sum.
        norm (str): Layout in which ``out_norm`` is part of the core; empty if it is not.
        positional (tuple): Further arguments with which the layer calls its core; other ones are refused.
        named (dict): Those by name.
    """

    layer: Any
    gets: str
    gives: str
    norm: str = ''
    positional: tuple = ()
    named: dict = field(default_factory=dict)

    def __call__(self, x, *positional, **named):
        if (positional, named) != (self.positional, self.named):
            raise TypeError(
                f'forward_core: called with {positional} and {named} besides x, but fused for {self.positional} and '
                f'{self.named}'
            )
        layer = self.layer
        if self.gets == 'BHWD':
            x = x.permute(0, 3, 1, 2)
        _, channels, height, width = x.shape
        routes = self.gives == 'routes'
        y = ss2d_scan(
            x,
            parameter_of(layer, 'x_proj_weight').reshape(4, -1, channels),
            parameter_of(layer, 'dt_projs_weight').reshape(4, channels, -1),
            parameter_of(layer, 'dt_projs_bias').reshape(4, channels),
            layer.A_logs.reshape(4 * channels, -1),
            layer.Ds.reshape(-1),
            out_dtype=torch.float32 if routes and x.dtype != torch.float64 else None,
        )
        if routes:
            y = y.flatten(2)
            nothing = y.new_zeros(()).expand_as(y)
            return y, nothing, nothing, nothing
        if self.norm:
            y = layer.out_norm(to_layout(y, self.norm))
            if self.norm == 'BLD':
                y = y.unflatten(1, (height, width))
            if self.norm in ('BLD', 'BHWD'):
                y = y.permute(0, 3, 1, 2)
        return to_layout(y, self.gives).to(x.dtype)

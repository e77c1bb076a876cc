"""Models as programs of torch.export, with dynamic batch, height and width, and the images that a program takes."""

from typing import Any, Optional

import sympy
import torch
from torch import nn
from torch.utils._sympy.value_ranges import bound_sympy

AXES = ('batch', 'channels', 'height', 'width')
SMALL, LARGE = 128, 250  # sides that a guard may rule out, and one that it may not
# shapes to try guards with: the smallest, odd ones, squares, wide and high ones
PROBES = ((1, 1, 1), (1, 33, 57), (2, 1, 640), (2, 640, 1), (3, 97, 97), (5, 100, 140), (7, 224, 224), (1, 1024, 2048))


def export_program(graph: nn.Module, example: torch.Tensor, dynamic: bool = True) -> torch.export.ExportedProgram:
    """Export a graph of images; the scan stays one node.

    Args:
        graph (nn.Module): Maps images to a tensor or a tuple of them, see :mod:`mmvmamba.export.graphs`.
        example (Tensor): Images to trace it with, (B, C, H, W). For dynamic sizes every map has to have sides of two
            pixels or more, since torch.export takes sides of one for the only ones; the batch may be any.
        dynamic (bool): Whether batch, height and width may change. Default: True.

    Returns:
        ExportedProgram: The program; :func:`dynamic_sizes` tells whether it takes all sizes.
    """
    if not dynamic:
        with torch.no_grad():
            return torch.export.export(graph, (example,), strict=False)
    side = torch.export.Dim.AUTO  # its bounds follow from what the model does
    batch = torch.export.Dim('batch', min=1)
    if len(example) == 1:  # which torch.export would take for the only one
        example = torch.cat([example, example])
    with torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes=({0: batch, 2: side, 3: side},), strict=False)


def dynamic_sizes(program: torch.export.ExportedProgram) -> list:
    """The least and the most that batch, channels, height and width may be, of a program that takes all between.

    torch.export lets a model fix a size, or ask for a relation between sizes, and keeps that as a guard of the program,
    which compiled code takes for granted. Guards that only rule out small sides raise the least.

    Raises:
        ValueError: If batch, height or width is fixed, or a guard does not hold for all sizes.
    """
    advice = 'expected any size: change the model, trace larger images, or give dynamic=False'
    sizes = accepted_sizes(program)
    for axis, (least, most) in zip(AXES, sizes):
        if axis != 'channels' and least == most:
            raise ValueError(f'the {axis} of the images is fixed at {least} by the model; {advice}')
    guards = getattr(program.module(), '_guards_fn', None)  # absent before torch 2.9, which refuses such models itself

    def broken(*shape: int) -> str:
        shape = tuple(max(least, n if most is None else min(n, most)) for n, (least, most) in zip(shape, sizes))
        try:
            if guards is not None:
                guards(torch.empty(shape, device='meta'))
        except AssertionError as error:
            return f'images {shape} do not fit the traced model ({error})'
        return ''

    for place, of_side in ((2, lambda n: (2, 1, n, LARGE)), (3, lambda n: (2, 1, LARGE, n))):
        least, most = sizes[place]
        failing = [n for n in range(least, SMALL) if broken(*of_side(n))]
        sizes[place] = (failing[-1] + 1 if failing else least, most)
    for batch, height, width in PROBES:
        if broken(batch, 1, height, width):
            raise ValueError(f'{broken(batch, 1, height, width)}; {advice}')
    return sizes


def accepted_sizes(program: torch.export.ExportedProgram) -> list:
    """The least and the most that batch, channels, height and width of the images may be; None for no bound."""
    (name,) = program.graph_signature.user_inputs
    images = next(node.meta['val'] for node in program.graph.nodes if node.op == 'placeholder' and node.name == name)
    sizes: list = []
    for size in images.shape:
        if isinstance(size, int):
            sizes.append((size, size))
            continue
        bounds: Any = bound_sympy(size.node.expr, program.range_constraints)
        sizes.append((int(bounds.lower), _finite(bounds.upper)))
    return sizes


def _finite(bound) -> Optional[int]:
    """A bound as a number; None for infinity, of sympy's and torch's kinds, and for a number too large to be a size."""
    return int(bound) if isinstance(bound, (int, sympy.Integer)) and bound < 2**31 else None

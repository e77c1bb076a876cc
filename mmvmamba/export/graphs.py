"""Models as functions of one tensor, normalised images (B, 3, H, W), ready to be traced at any size."""

import copy
from typing import Any

import torch
from torch import nn


class FeatureGraph(nn.Module):
    """Backbone, or backbone and neck of a detector; gives a tuple of maps (B, C, h, w)."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.parts = nn.Sequential(*modules)

    def forward(self, x: torch.Tensor) -> tuple:
        return tuple(self.parts(x))


class ClassifierGraph(nn.Module):
    """Scores before the softmax, (B, classes)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x, mode='tensor')


class SegmentorGraph(nn.Module):
    """Scores before the softmax at the size of the image, (B, classes, H, W)."""

    def __init__(self, model: Any):
        super().__init__()
        self.backbone, self.head = model.backbone, model.decode_head
        self.neck = model.neck if model.with_neck else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.head(self.neck(self.backbone(x)))
        corners = self.head.align_corners
        return nn.functional.interpolate(scores, size=x.shape[2:], mode='bilinear', align_corners=corners)


class Autocast(nn.Module):
    """A graph under autocast, with results in float32."""

    # no attribute may be called graph: a traced module has one of its own
    def __init__(self, graph: nn.Module, device_type: str, dtype: torch.dtype):
        super().__init__()
        self.wrapped, self.device_type, self.dtype = graph, device_type, dtype

    def forward(self, x: torch.Tensor) -> Any:
        with torch.autocast(self.device_type, self.dtype):
            results = self.wrapped(x)
        if isinstance(results, torch.Tensor):
            return results.float()
        return tuple(result.float() for result in results)


class AdaptiveAvgPool(nn.Module):
    """Adaptive average pooling as two matrix products; exact for any size, where ONNX has an operator for 1x1 only."""

    def __init__(self, cells: tuple):
        super().__init__()
        self.cells = cells

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = (self.averages(size, cells, x) for size, cells in zip(x.shape[2:], self.cells))
        return rows @ x @ columns.transpose(0, 1)

    @staticmethod
    def averages(size, cells: int, like: torch.Tensor) -> torch.Tensor:
        """Matrix (cells, size) whose row i averages the pixels floor(i size / cells) to ceil((i + 1) size / cells)."""
        cell = torch.arange(cells, device=like.device)[:, None]
        pixel = torch.arange(size, device=like.device)
        start = torch.div(cell * size, cells, rounding_mode='floor')
        end = torch.div((cell + 1) * size + (cells - 1), cells, rounding_mode='floor')
        inside = ((pixel >= start) & (pixel < end)).to(like.dtype)
        return inside / inside.sum(dim=1, keepdim=True)


def as_graph(model: nn.Module, scope: str, part: str = 'auto') -> tuple:
    """What to export of a model.

    Args:
        model (nn.Module): Model of a codebase; it is not changed.
        scope (str): mmpretrain, mmdet or mmseg.
        part (str): ``backbone``, or ``auto``: a classifier or segmentor whole, a detector's backbone and neck.

    Returns:
        tuple[nn.Module, tuple[str, ...]]: The graph in eval mode, and names of its outputs (empty for maps, whose
        number only a run tells).
    """
    own: Any = copy.deepcopy(model).eval()
    graph: nn.Module
    names: tuple = ()
    if part == 'backbone':
        graph = FeatureGraph(own.backbone)
    elif scope == 'mmdet':
        graph = FeatureGraph(own.backbone, *([own.neck] if own.with_neck else []))
    else:
        graph, names = dict(mmpretrain=ClassifierGraph, mmseg=SegmentorGraph)[scope](own), ('scores',)
    _replace_pools(graph)
    return graph.eval(), names


def _replace_pools(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.AdaptiveAvgPool2d):
            cells: Any = child.output_size
            cells = (cells, cells) if isinstance(cells, int) else tuple(cells)
            if cells != (1, 1):
                setattr(module, name, AdaptiveAvgPool(cells))
        else:
            _replace_pools(child)


def relative_error(outputs, expected) -> float:
    """Largest difference of any output to the expected one, relative to that one's largest value; NaN counts as inf."""
    errors = [
        float((out - reference).abs().max() / reference.abs().max()) if out.shape == reference.shape else float('inf')
        for out, reference in zip(outputs, expected)
    ]
    return max(error if error == error else float('inf') for error in errors)


def as_tuple(value) -> tuple:
    """One tensor or several, as a tuple."""
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)

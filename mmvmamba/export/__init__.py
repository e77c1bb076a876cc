"""Ways out of Python: models as graphs of tensors, and the scan in standard ONNX operators."""

from pathlib import Path
from typing import Optional

import torch
from torch import nn

from mmvmamba.checkpoint.whole import commit, remove

from .int8 import Int8Hook, to_int8
from .runtime_backbone import RuntimeBackbone

__all__ = ['Int8Hook', 'RuntimeBackbone', 'to_int8', 'to_onnx']


def to_onnx(
    module: nn.Module, example: torch.Tensor, path, names: Optional[tuple] = None, metadata: Optional[dict] = None
) -> Path:
    """Write any module that holds a VMamba as an ONNX file of standard operators; batch, height and width are dynamic.

    Args:
        module (nn.Module): Maps images to a tensor or a tuple of them; on the CPU, in float32 and eval mode.
        example (Tensor): Images to trace it with, (B, C, H, W), H and W multiples of 32.
        path (str | Path): The file; one of that name is replaced when the new one is whole.
        names (tuple[str, ...], optional): A name an output. Default: ``output0``, ``output1``, ...
        metadata (dict, optional): Texts to keep in the file. Default: none.

    Returns:
        Path: The file.

    Raises:
        TypeError: If ``module`` or ``example`` is of another type.
        ValueError: If ``module`` trains, is not in float32 on the CPU, or has a scan that ONNX cannot hold.
    """
    from .graphs import as_tuple
    from .onnx_scan import export_onnx

    if not isinstance(module, nn.Module):
        raise TypeError(f'module is a {type(module).__name__}, expected a torch.nn.Module')
    if not isinstance(example, torch.Tensor) or example.dim() != 4:
        raise TypeError(f'example is {getattr(example, "shape", type(example).__name__)}, expected images (B, C, H, W)')
    if module.training:
        raise ValueError('module is in training mode, expected module.eval()')
    odd = next((p for p in module.parameters() if p.dtype != torch.float32 or p.device.type != 'cpu'), None)
    if odd is not None:
        raise ValueError(f'module has parameters in {odd.dtype} on {odd.device}, expected float32 on the CPU')
    if names is None:
        with torch.no_grad():
            names = tuple(f'output{i}' for i, _ in enumerate(as_tuple(module(example))))
    path = Path(path)
    partial = path.with_name(f'{path.name}.partial')
    try:
        export_onnx(module, example, tuple(names), partial, metadata or {})
        commit(str(partial), str(path))
    finally:
        remove(str(partial))
    return path

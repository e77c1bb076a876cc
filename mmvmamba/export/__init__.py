"""Ways out of Python: models as graphs of tensors, ONNX files for any runtime, and packages for C++."""

from collections.abc import Iterable
from pathlib import Path
from typing import Optional

import torch
from torch import nn

from mmvmamba.checkpoint.whole import commit, remove

from .int8 import Int8Hook, to_int8
from .loading import Package
from .onnxruntime import onnxruntime_library
from .openvino import openvino_library
from .package import op_library, to_package
from .runtime_backbone import RuntimeBackbone

__all__ = [
    'Int8Hook',
    'Package',
    'RuntimeBackbone',
    'onnxruntime_library',
    'op_library',
    'openvino_library',
    'to_int8',
    'to_onnx',
    'to_package',
]


def to_onnx(
    module: nn.Module,
    example: torch.Tensor,
    path,
    names: Optional[tuple] = None,
    metadata: Optional[dict] = None,
    scan: str = 'auto',
    float16: bool = False,
    quantize: Optional[str] = None,
    calibration: Optional[Iterable] = None,
) -> Path:
    """Write any module that holds a VMamba as an ONNX file; batch, height and width are dynamic.

    Args:
        module (nn.Module): Maps images to a tensor or a tuple of them; on the CPU, in float32 and eval mode.
        example (Tensor): Images to trace it with, (B, C, H, W), H and W multiples of 32.
        path (str | Path): The file; one of that name is replaced when the new one is whole.
        names (tuple[str, ...], optional): A name an output. Default: ``output0``, ``output1``, ...
        metadata (dict, optional): Texts to keep in the file. Default: none.
        scan (str): The selective scan in standard operators, along rows and columns with ``Scan`` (``rows``) or without
            a loop (``loop-free``), or as one operator of :func:`onnxruntime_library` and :func:`openvino_library`
            (``custom-op``). Default: ``auto``, which is ``rows``.
        float16 (bool): Whether all but the scan, the input and the outputs is in float16. Default: False.
        quantize (str, optional): int8 linear layers, with scales of the activations that are computed at each run
            (``dynamic``) or found from ``calibration`` (``static``). Default: None.
        calibration (Iterable[Tensor], optional): Batches of images (B, C, H, W) as ``module`` takes them, for
            ``static``. Default: None.

    Returns:
        Path: The file.

    Raises:
        TypeError: If ``module``, ``example`` or an image of ``calibration`` is of another type.
        ValueError: If ``module`` trains, is not in float32 on the CPU, or has a scan that ONNX cannot hold; or if
            ``scan``, ``float16``, ``quantize`` and ``calibration`` do not go together.
    """
    from .graphs import as_tuple
    from .onnx_scan import check_scan, export_onnx
    from .precision import check_precision, quantize_file

    scan = check_scan(scan)
    check_precision(scan, float16, quantize, calibration)
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
        export_onnx(module, example, tuple(names), partial, metadata or {}, scan, float16)
        if quantize:
            quantize_file(partial, quantize, calibration)
        commit(str(partial), str(path))
    finally:
        remove(str(partial))
    return path

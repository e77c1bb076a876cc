"""Files in lower precision: float16 for all but the scan, or int8 linear layers."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import torch

LINEAR = ['MatMul', 'Gemm']  # what is quantised; the nodes inside a Scan are not


def check_precision(scan: str, float16: bool, quantize: Optional[str], calibration: Any) -> None:
    """Check what :func:`mmvmamba.export.to_onnx` is asked for before any work.

    Raises:
        ValueError: If an argument has an unknown value, or two of them do not go together.
    """
    if quantize not in (None, 'dynamic', 'static'):
        raise ValueError(f'quantize is {quantize!r}, expected dynamic, static or None')
    if float16 and quantize:
        raise ValueError(f'float16 is True and quantize is {quantize!r}, expected one of the two')
    if float16 and scan == 'loop-free':
        raise ValueError("float16 is True, expected scan 'rows' or 'custom-op', whose decays stay in float32")
    if quantize == 'static' and scan == 'custom-op':
        raise ValueError(
            "quantize is 'static', expected scan 'rows' or 'loop-free': onnxruntime calibrates without the library"
        )
    if (quantize == 'static') != (calibration is not None):
        found = 'not given' if calibration is None else 'given'
        raise ValueError(f'calibration is {found} and quantize is {quantize!r}; static needs images, others take none')


def to_float16(model: Any, keep: list) -> Any:
    """Convert an ONNX model to float16 but for its input, its outputs and the operators named in ``keep``."""
    from onnx import TensorProto, helper
    from onnxruntime.transformers import float16, onnx_model

    # the conversion casts at the ends of what it keeps where it knows the types
    constants = {tensor.name for tensor in model.graph.initializer}
    known = {value.name for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]} | constants
    for node in model.graph.node:
        if node.op_type in keep:
            for name in {*node.input, *node.output} - known - {''}:
                model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
                known.add(name)
    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *keep]
    model = float16.convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked, disable_shape_infer=True)
    del model.graph.value_info[:]  # which has the types of before
    onnx_model.OnnxModel(model).topological_sort()  # the conversion leaves its casts at the end
    return model


class _Images:
    """Calibration images in turn, as onnxruntime asks for them."""

    def __init__(self, images: Iterable):
        self.images = iter(images)
        self.count = 0

    def get_next(self) -> Optional[dict]:
        image = next(self.images, None)
        if image is None:
            return None
        if not isinstance(image, torch.Tensor) or image.dim() != 4:
            found = getattr(image, 'shape', type(image).__name__)
            raise TypeError(f'calibration has {found}, expected images (B, C, H, W)')
        self.count += 1
        return dict(images=image.detach().float().numpy())


def quantize_file(path: Path, quantize: str, calibration: Optional[Iterable]) -> None:
    """Quantise the linear layers of a file to int8, in its place.

    Weights are signed, with a scale a channel; activations are unsigned, with a scale that is computed at each run
    (``dynamic``) or found from images (``static``).
    """
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        prepared, done = Path(folder) / 'prepared.onnx', Path(folder) / 'quantized.onnx'
        # onnxruntime's optimiser would fuse layers to operators of its own, and does not know ours
        quantization.quant_pre_process(str(path), str(prepared), skip_optimization=True, skip_symbolic_shape=True)
        options: dict = dict(op_types_to_quantize=LINEAR, per_channel=True, weight_type=quantization.QuantType.QInt8)
        if quantize == 'dynamic':
            quantization.quantize_dynamic(str(prepared), str(done), **options)
        else:
            images = _Images(calibration or ())
            options['activation_type'] = quantization.QuantType.QUInt8
            try:
                quantization.quantize_static(str(prepared), str(done), images, **options)
            except ValueError as error:
                if images.count == 0:
                    raise ValueError('calibration has no images, expected at least one') from error
                raise
        done.replace(path)

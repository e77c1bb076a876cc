"""A VMamba as an ONNX file, with dynamic batch, height and width; each form of the scan has a module of its own."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmvmamba.layers import SS2D, intercept_scan
from mmvmamba.ops import use_backend

from . import onnx_custom_op, onnx_heads, onnx_loop_free, onnx_rows
from .precision import to_float16

OPSET = 17
DOMAIN = onnx_custom_op.DOMAIN
SCANS: dict = {'rows': onnx_rows, 'loop-free': onnx_loop_free, 'custom-op': onnx_custom_op}
"""The forms of the selective scan; ``auto`` is the first."""


def export_onnx(
    graph: nn.Module,
    example: torch.Tensor,
    output_names: tuple,
    path: Path,
    metadata: dict,
    scan: str = 'auto',
    float16: bool = False,
) -> None:
    """Write a graph as an ONNX file, checked by ``onnx.checker``.

    Args:
        graph (nn.Module): Maps images to a tensor or a tuple of them, see :mod:`mmvmamba.export.graphs`; on the CPU, in
            float32 and eval mode.
        example (Tensor): Images to trace it with, (B, 3, H, W), H and W multiples of 32.
        output_names (tuple[str, ...]): A name an output.
        path (Path): The file; batch, height and width are dynamic in it.
        metadata (dict): Texts to keep in the file's ``metadata_props``.
        scan (str): Form of the selective scan, ``auto`` or a key of :data:`SCANS`. Default: ``auto``.
        float16 (bool): Whether to convert all but the scan, the input and the outputs to float16. Default: False.

    Raises:
        ValueError: If a scan has the mode cascade2d, whose lines become batches: the tracer fixes their number; or if
            it carries its state between calls, which a graph can't.
    """
    import onnx

    form = SCANS[check_scan(scan)]
    options = [module.options for module in graph.modules() if isinstance(module, SS2D)]
    if any(option.with_initial_state for option in options):
        raise ValueError('with_initial_state is True, expected False: a graph carries no state between calls')
    if any(option.scan_mode == 'cascade2d' for option in options):
        raise ValueError('scan_mode is cascade2d, which cannot be exported to ONNX; expected cross2d, unidi or bidi')
    if float16 and any(option.core == 'ssd' for option in options):
        raise ValueError("core is 'ssd', expected 's6' for float16: the decays of heads would lose their precision")
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    dynamic = dict(images=axes)
    with use_backend('naive'), intercept_scan(_traceable(form)), torch.no_grad():
        outputs = graph(example)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        for name, output in zip(output_names, outputs):
            dynamic[name] = {
                axis: f'{name}_{label}' if axis else label for axis, label in axes.items() if axis < output.dim()
            }
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # checks of arguments are traced too, and hold at every size
            torch.onnx.export(
                graph,
                (example,),
                str(path),
                input_names=['images'],
                output_names=list(output_names),
                dynamic_axes=dynamic,
                opset_version=OPSET,
                custom_opsets={DOMAIN: 1},
                dynamo=False,
            )
    model = onnx.load(str(path))
    _keep_constants(model)
    if float16:
        nodes = {node.op_type for node in model.graph.node}
        scans = tuple(form.PREFIX for form in SCANS.values())
        model = to_float16(model, sorted(name for name in nodes if name.startswith(scans)))
    model = _with_standard_operators(model)
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def check_scan(scan: str) -> str:
    """Check a form of the scan by name; returns a key of :data:`SCANS`."""
    if scan == 'auto':
        return next(iter(SCANS))
    if scan not in SCANS:
        raise ValueError(f'scan is {scan!r}, expected one of auto, {", ".join(SCANS)}')
    return scan


def _traceable(form: Any):
    def scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode):
        if dt_projs_weight is None:
            return onnx_heads.traceable_heads(x, x_proj_weight, dt_projs_bias, A_logs, Ds, scan_mode)
        return form.scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode)

    return scan


def _with_standard_operators(model: Any) -> Any:
    """Put the functions of the package in the place of their nodes."""
    from onnx import inliner, parser

    texts = dict(AnySize=onnx_heads.ANY_SIZE, Keep=onnx_rows.KEEP)
    for name in sorted({node.op_type for node in model.graph.node if node.domain == DOMAIN}):
        for form in SCANS.values():
            texts.update({name: form.function_text(name)} if name.startswith(form.PREFIX) else {})
    model.functions.extend(parser.parse_function(text) for text in texts.values() if text)
    model = inliner.inline_local_functions(model)
    _keep_constants(model)
    used = {name for graph in _graphs(model.graph) for node in graph.node for name in node.input}
    used.update(output.name for output in model.graph.output)
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)
    if all(node.domain != DOMAIN for node in model.graph.node):
        for entry in [entry for entry in model.opset_import if entry.domain == DOMAIN]:
            model.opset_import.remove(entry)
    return model


def _keep_constants(model: Any) -> None:
    """Turn constants that are nodes of a model into initializers."""
    constants = [node for node in model.graph.node if node.op_type == 'Constant' and node.attribute[0].name == 'value']
    for node in constants:
        tensor = node.attribute[0].t
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
        model.graph.node.remove(node)


def _graphs(graph: Any) -> Any:
    """A graph and all inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField('g'):
                yield from _graphs(attribute.g)

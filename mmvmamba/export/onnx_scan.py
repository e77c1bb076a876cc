"""A VMamba in standard ONNX operators, with dynamic batch, height and width.

ONNX has no selective scan, and its Scan operator takes one step at a time: too slow over the thousands of pixels of an
image.  The recurrence h_t = a_t h_{t-1} + b_t is associative, so here the steps are cut into about sqrt(L) chunks: one
Scan walks through all chunks side by side, a second one carries the states from chunk to chunk, and each step adds the
product of its chunk's decays so far times the state before the chunk.  That is exact algebra; as every decay lies in
(0, 1], no product can overflow.  The scan of Mamba-2 needs no loop, see :mod:`mmvmamba.export.onnx_heads`.
"""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mmvmamba.layers import SS2D, intercept_scan
from mmvmamba.ops import use_backend
from mmvmamba.ops.cross_scan.naive import cross_merge, cross_scan

from .onnx_heads import ANY_SIZE, AnySize, traceable_heads

OPSET = 17
_DOMAIN = 'mmvmamba'

# inputs a, b: (L, M), decays and drives; output h: (L, M)
_CHUNKED_SCAN = """
<domain: "mmvmamba", opset_import: ["" : 17]>
ChunkedScan (a, b) => (h) {
    one = Constant <value = int64[1] {1}> ()
    none = Constant <value = int64[1] {0}> ()
    decay_of_padding = Constant <value = float {1.0}> ()
    drive_of_padding = Constant <value = float {0.0}> ()
    shape = Shape (a)
    length = Gather <axis = 0> (shape, none)
    width = Gather <axis = 0> (shape, one)

    root = Cast <to = 1> (length)
    root_up = Sqrt (root)
    root_ceil = Ceil (root_up)
    steps = Cast <to = 7> (root_ceil)
    length_up = Add (length, steps)
    length_up_1 = Sub (length_up, one)
    chunks = Div (length_up_1, steps)
    padded = Mul (chunks, steps)
    missing = Sub (padded, length)
    pads = Concat <axis = 0> (none, none, missing, none)
    a_padded = Pad (a, pads, decay_of_padding)
    b_padded = Pad (b, pads, drive_of_padding)
    by_chunk = Concat <axis = 0> (chunks, steps, width)
    a_by_chunk = Reshape (a_padded, by_chunk)
    b_by_chunk = Reshape (b_padded, by_chunk)
    a_by_step = Transpose <perm = [1, 0, 2]> (a_by_chunk)
    b_by_step = Transpose <perm = [1, 0, 2]> (b_by_chunk)

    all_chunks = Concat <axis = 0> (chunks, width)
    zeros = ConstantOfShape <value = float[1] {0.0}> (all_chunks)
    ones = ConstantOfShape <value = float[1] {1.0}> (all_chunks)
    h_end, p_end, h_inside, p_inside = Scan <num_scan_inputs = 2, body = step (
        float[?, ?] h_before, float[?, ?] p_before,
        float[?, ?] a_t, float[?, ?] b_t
    ) => (
        float[?, ?] h_after, float[?, ?] p_after,
        float[?, ?] h_t, float[?, ?] p_t
    ) {
        decayed = Mul (a_t, h_before)
        h_after = Add (decayed, b_t)
        p_after = Mul (a_t, p_before)
        h_t = Identity (h_after)
        p_t = Identity (p_after)
    }> (zeros, ones, a_by_step, b_by_step)

    first = ConstantOfShape <value = float[1] {0.0}> (width)
    last, carries = Scan <num_scan_inputs = 2, body = carry (
        float[?] c_before, float[?] p_chunk, float[?] h_chunk
    ) => (float[?] c_after, float[?] c) {
        c_decayed = Mul (p_chunk, c_before)
        c_after = Add (c_decayed, h_chunk)
        c = Identity (c_before)
    }> (first, p_end, h_end)

    carried = Mul (p_inside, carries)
    h_by_step = Add (h_inside, carried)
    h_by_chunk = Transpose <perm = [1, 0, 2]> (h_by_step)
    all_steps = Concat <axis = 0> (padded, width)
    h_padded = Reshape (h_by_chunk, all_steps)
    h = Slice (h_padded, none, length, none)
}
"""


class _ChunkedScan(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t along the first dimension of (L, M): one node while tracing."""

    @staticmethod
    def forward(ctx, a, b):
        h, states = torch.zeros_like(b[0]), []
        for a_t, b_t in zip(a, b):
            h = a_t * h + b_t
            states.append(h)
        return torch.stack(states)

    @staticmethod
    def symbolic(g, a, b):
        type_ = a.type().with_sizes([None, None])  # the traced sizes must not be taken for the only ones
        return g.op(f'{_DOMAIN}::ChunkedScan', a, b).setType(type_)


def _traceable_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode):
    """The scan of a map in plain PyTorch, its loop over time as one node; see :func:`mmvmamba.layers.scan_routes`."""
    if dt_projs_weight is None:
        return traceable_heads(x, x_proj_weight, dt_projs_bias, A_logs, Ds, scan_mode)
    routes, channels, dt_rank = dt_projs_weight.shape
    d_state = A_logs.shape[1]
    u = cross_scan(x, scan_mode, channel_last=False)  # (B, K, D, L)
    dt, B, C = torch.matmul(x_proj_weight, u).split([int(dt_rank), int(d_state), int(d_state)], dim=2)
    delta = F.softplus(torch.matmul(dt_projs_weight, dt) + dt_projs_bias.unsqueeze(-1)).unsqueeze(3)
    A = -torch.exp(A_logs).unflatten(0, (int(routes), int(channels))).unsqueeze(-1)

    decay = torch.exp(delta * A)  # (B, K, D, N, L)
    drive = delta * u.unsqueeze(3) * B.unsqueeze(2)
    h = _ChunkedScan.apply(*(value.flatten(1, 3).permute(2, 0, 1).flatten(1) for value in (decay, drive)))
    h = h.unflatten(1, (-1, int(routes), int(channels), int(d_state)))  # (L, B, K, D, N)
    y = (h.permute(1, 2, 3, 4, 0) * C.unsqueeze(2)).sum(dim=3)
    y = y + Ds.unflatten(0, (int(routes), int(channels))).unsqueeze(-1) * u
    return AnySize.apply(cross_merge(y, x.shape[2:], scan_mode, channel_last=False))


def export_onnx(graph: nn.Module, example: torch.Tensor, output_names: tuple, path: Path, metadata: dict) -> None:
    """Write a graph as an ONNX file, checked by ``onnx.checker``.

    Args:
        graph (nn.Module): Maps images to a tensor or a tuple of them, see :mod:`mmvmamba.export.graphs`; on the CPU, in
            float32 and eval mode.
        example (Tensor): Images to trace it with, (B, 3, H, W), H and W multiples of 32.
        output_names (tuple[str, ...]): A name an output.
        path (Path): The file; batch, height and width are dynamic in it.
        metadata (dict): Texts to keep in the file's ``metadata_props``.

    Raises:
        ValueError: If a scan has the mode cascade2d, whose lines become batches: the tracer fixes their number; or if
            it carries its state between calls, which a graph can't.
    """
    import onnx
    from onnx import inliner, parser

    options = [module.options for module in graph.modules() if isinstance(module, SS2D)]
    if any(option.with_initial_state for option in options):
        raise ValueError('with_initial_state is True, expected False: a graph carries no state between calls')
    if any(option.scan_mode == 'cascade2d' for option in options):
        raise ValueError('scan_mode is cascade2d, which cannot be exported to ONNX; expected cross2d, unidi or bidi')
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    dynamic = dict(images=axes)
    with use_backend('naive'), intercept_scan(_traceable_scan), torch.no_grad():
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
                custom_opsets={_DOMAIN: 1},
                dynamo=False,
            )
    model = onnx.load(str(path))
    model.functions.extend(parser.parse_function(text) for text in (_CHUNKED_SCAN, ANY_SIZE))
    model = inliner.inline_local_functions(model)
    for entry in [entry for entry in model.opset_import if entry.domain == _DOMAIN]:
        model.opset_import.remove(entry)
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))

"""The scan of Mamba-2 blocks for ONNX: matrix products without a loop, for any size of a map."""

import torch

from mmvmamba.layers.heads import project_heads
from mmvmamba.ops.ssd_scan import chunked, routes

ANY_SIZE = """
<domain: "mmvmamba", opset_import: ["" : 17]>
AnySize (x) => (y) {
    y = Identity (x)
}
"""


class AnySize(torch.autograd.Function):
    """A map as it is, whose traced sizes the exporter must not take for the only ones; it sees a function."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def symbolic(g, x):
        return g.op('mmvmamba::AnySize', x).setType(x.type().with_sizes([None] * 4))


def traceable_heads(x, x_proj_weight, dt_projs_bias, A_logs, Ds, scan_mode) -> torch.Tensor:
    """The scan of a map (B, D, H, W) in plain PyTorch; arguments as in :func:`mmvmamba.layers.scan_routes`.

    Within chunks of 64 pixels as in :mod:`mmvmamba.ops.ssd_scan.chunked`; the states of all chunks by one product with
    a matrix of as many rows, whose size grows with the square of the map's.
    """
    size, heads = x.shape[2:], int(Ds.shape[1])
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
    dt, B, C = project_heads(pixels, x_proj_weight, Ds)
    xs, dts, Bs, Cs = routes.scan_inputs(pixels.unflatten(2, (heads, -1)), dt, B, C, size, scan_mode)
    A, D, bias = -torch.exp(A_logs).flatten(), Ds.flatten(0, 1), dt_projs_bias.flatten()
    out, _ = chunked.ssd_scan(
        xs, dts, A, Bs, Cs, D, bias, dt_softplus=True, carry=chunked.carry_at_once, length=size[0] * size[1]
    )
    return AnySize.apply(routes.merge(out, size, scan_mode).flatten(2).unflatten(1, size).permute(0, 3, 1, 2))

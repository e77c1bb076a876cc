"""The selective scan as one node of a custom operator, which the library of :mod:`.onnxruntime` computes."""

import torch

from .onnx_parameters import Parameters

DOMAIN = 'mmvmamba'
PREFIX = 'SS2DScan'


def function_text(name: str) -> str:
    """Nothing: the node stays as it is."""
    return ''


class _SS2DScan(torch.autograd.Function):
    """The scan after its projections as one node; while tracing only the shape of its output counts."""

    @staticmethod
    def forward(ctx, x, projections, dt_weight, dt_bias, A, skip, scan_mode, channels):
        return x.clone()

    @staticmethod
    def symbolic(g, x, projections, dt_weight, dt_bias, A, skip, scan_mode, channels):
        type_ = x.type().with_sizes([None, None, None, channels])
        inputs = (x, projections, dt_weight, dt_bias, A, skip)
        return g.op(f'{DOMAIN}::{PREFIX}', *inputs, scan_mode_s=scan_mode).setType(type_)


def scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode) -> torch.Tensor:
    """The scan of a map (B, D, H, W) to be traced; arguments as in :func:`mmvmamba.layers.scan_routes`."""
    own = Parameters(x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    last = x.permute(0, 2, 3, 1)
    y = _SS2DScan.apply(
        last,
        torch.matmul(last, own.projection),
        *(torch.from_numpy(array.copy()) for array in (own.dt_weight, own.dt_bias, own.A)),
        own.skip,
        scan_mode,
        len(own.skip),
    )
    return y.permute(0, 3, 1, 2)

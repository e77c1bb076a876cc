"""Count the parameters and FLOPs of the model of a config, a whole detector or segmentor included.

python tools/analysis/get_flops.py CONFIG [--shape HEIGHT WIDTH] [--by-module] [--depth 3]

The rule is the one of the published tables: fvcore's multiply-adds of convolutions, linear layers and einsums, a few
operations an element for norms and pooling, and 9 B L D N + B D L for a selective scan of D channels.  The published
code counts nothing of Mamba-2's scan; here it has the multiply-adds of its matrix products, in chunks of 64 steps.
"""

import argparse
import functools
import importlib
import sys

import torch
from fvcore.nn import FlopCountAnalysis, flop_count_table
from fvcore.nn.jit_handles import get_shape
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope

from mmvmamba import cli
from mmvmamba.layers import intercept_scan

ROUTES = 4
CHUNK = 64  # steps, of the matrix products of Mamba-2's scan
NORM_FLOPS = 4  # an element of a norm without weights, by fvcore's rule
# free by the rule: fvcore does not know the activations, and ignores the ones that it knows
FREE_OPS = ('silu', 'silu_', 'gelu', 'sigmoid', 'neg', 'exp', 'flip', 'softmax')


# ---- the scan, counted instead of run: only shapes matter -----------------------------------------------------------
@torch.library.custom_op('mmvmamba_flops::scan_routes', mutates_args=())
def counted_scan(x: torch.Tensor, dt_projs_weight: torch.Tensor, A_logs: torch.Tensor, scan_mode: str) -> torch.Tensor:
    """Stands for :func:`mmvmamba.layers.scan_routes` in a trace, on any backend; (B, D, H, W) of zeros."""
    return torch.zeros_like(x)


counted_scan.register_fake(lambda x, dt_projs_weight, A_logs, scan_mode: torch.empty_like(x))


@torch.library.custom_op('mmvmamba_flops::scan_heads', mutates_args=())
def counted_heads(x: torch.Tensor, x_proj_weight: torch.Tensor, A_logs: torch.Tensor) -> torch.Tensor:
    """Stands for the scan of Mamba-2 blocks; (B, D, H, W) of zeros."""
    return torch.zeros_like(x)


counted_heads.register_fake(lambda x, x_proj_weight, A_logs: torch.empty_like(x))


def ssd_flops(batch: int, length: int, heads: int, channels: int, d_state: int, routes: int = ROUTES) -> int:
    """FLOPs of a scan of Mamba-2 with skip connection, of ``heads`` heads of ``channels`` channels on each route.

    In a chunk of Q = 64 steps, C B^T takes Q N multiply-adds a step and route, and a head Q P + 2 P N.
    """
    chunk, width = min(length, CHUNK), heads * channels
    return batch * length * routes * (chunk * d_state + width * (chunk + 2 * d_state + 1))


def _handle_heads(inputs, outputs):
    (batch, channels, height, width), weight, A_logs = (get_shape(value) for value in inputs)
    (routes, heads), length = A_logs, height * width
    d_state = (weight[1] - heads) // 2
    projections = batch * length * channels * routes * weight[1]
    return projections + ssd_flops(batch, length, heads, channels // heads, d_state, routes)


def selective_scan_flops(batch: int, dim: int, length: int, d_state: int) -> int:
    """FLOPs of a selective scan with skip connection, as counted by the authors of Mamba."""
    return 9 * batch * length * dim * d_state + batch * dim * length


def scan_flops(shape: tuple, dt_rank: int, d_state: int, scan_mode: str = 'cross2d') -> int:
    """FLOPs of a scan: projection to dt, B and C, projection of dt to all channels, and the recurrence, on four routes.

    In the mode cascade2d, whose two passes have two routes each, two layer norms without weights are added.

    Args:
        shape (tuple[int]): Shape of the map, (B, D, H, W).
        dt_rank (int): R.
        d_state (int): N.
        scan_mode (str): As in :class:`mmvmamba.layers.SS2DOptions`. Default: ``cross2d``.
    """
    batch, channels, height, width = shape
    length, dim = height * width, ROUTES * channels
    projections = batch * length * dim * (dt_rank + 2 * d_state) + batch * length * dim * dt_rank
    norms = 2 * NORM_FLOPS * batch * channels * length if scan_mode == 'cascade2d' else 0
    return projections + norms + selective_scan_flops(batch, dim, length, d_state)


def _handle_scan(inputs, outputs):
    x, dt_projs_weight, A_logs = (get_shape(value) for value in inputs[:3])
    return scan_flops(x, dt_projs_weight[2], A_logs[1], inputs[3].toIValue())


def counted_ops():
    """Let every SS2D call the stand-in, so that the count does not depend on the op backend, nor take its time."""

    def scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode, initial_state=None):
        if dt_projs_weight is None:
            y = counted_heads(x, x_proj_weight, A_logs)
            return y if initial_state is None else (y, initial_state)
        return counted_scan(x, dt_projs_weight, A_logs, scan_mode)

    return intercept_scan(scan)


# ---- models ---------------------------------------------------------------------------------------------------------
def build_model(cfg: Config) -> torch.nn.Module:
    """Build the model of a config with random weights, in eval mode."""
    init_default_scope(cfg.default_scope)
    model_cfg = cfg.model.copy()
    if cfg.get('data_preprocessor'):
        model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = importlib.import_module(f'{cfg.default_scope}.registry').MODELS.build(model_cfg)
    return revert_sync_batchnorm(model).eval()


def default_shape(cfg: Config) -> tuple:
    """(height, width) of the published tables: 224x224, 1280x800, and (size, 4 size) for crops of a size."""
    scope = cfg.get('default_scope')
    if scope == 'mmpretrain':
        return 224, 224
    if scope == 'mmdet':
        return 1280, 800
    size = cfg.get('crop_size', (512, 512))[0]
    return size, 4 * size


def count(cfg: Config, shape: tuple) -> FlopCountAnalysis:
    """Trace the forward pass of one image.

    Args:
        cfg (Config): Config of mmpretrain, mmdet or mmseg.
        shape (tuple[int]): Height and width.

    Returns:
        FlopCountAnalysis: Lazy counts, by module and by operator; ``total()`` is already computed.
    """
    model = build_model(cfg)
    if cfg.default_scope == 'mmdet':
        from mmdet.structures import DetDataSample

        meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
        model.forward = functools.partial(model.forward, data_samples=[DetDataSample(metainfo=meta)])
    analysis = FlopCountAnalysis(model, torch.randn(1, cli.image_channels(model), *shape))
    analysis.set_op_handle('mmvmamba_flops::scan_routes', _handle_scan)
    analysis.set_op_handle('mmvmamba_flops::scan_heads', _handle_heads)
    for name in FREE_OPS:
        analysis.set_op_handle(f'aten::{name}', None)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings('none')
    with counted_ops(), torch.no_grad():
        analysis.total()
    return analysis


def count_parameters(model: torch.nn.Module) -> int:
    """Number of parameters, trained or frozen."""
    return sum(parameter.numel() for parameter in model.parameters())


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='path of the config, or SCOPE::NAME')
    parser.add_argument(
        '--shape', type=int, nargs='+', metavar='SIZE', help='height and width, or one side (default: as published)'
    )
    parser.add_argument('--by-module', action='store_true', help='print a table with the counts of each module')
    parser.add_argument('--depth', type=int, default=3, help='depth of the table (default: 3)')
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    """Count what the command line asks for, and print it."""
    cfg = cli.read_config(args.config)
    shape = cli.parse_size(args.shape, '--shape') or default_shape(cfg)
    analysis = count(cfg, shape)
    if args.by_module:
        print(flop_count_table(analysis, max_depth=args.depth, show_param_shapes=False))
    parameters, flops = count_parameters(analysis._model), analysis.total()
    print(f'config:     {args.config}')
    print(f'input:      1 x 3 x {shape[0]} x {shape[1]} (height x width)')
    print(f'parameters: {parameters:,} ({parameters / 1e6:.2f} M)')
    print(f'FLOPs:      {flops:,.0f} ({flops / 1e9:.2f} G)')
    free = sorted(name for name in analysis.unsupported_ops())
    print(f'counted as 0: {", ".join(free) or "nothing"}')


def main(arguments=None) -> int:
    """Run; returns the exit code."""
    return cli.run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())

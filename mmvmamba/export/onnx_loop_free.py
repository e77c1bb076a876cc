"""The selective scan in standard ONNX operators without a loop, for runtimes that have no ``Scan`` or a slow one.

The recurrence h_t = a_t h_{t-1} + b_t is associative.  The steps are cut into pieces of a fixed length: within all
pieces at once, step after step, run the states from zero and the products of the decays; the ends of the pieces are a
sequence of the same kind, a sixteenth as long, which the next level solves; then each step adds its product times the
state before its piece.  That is exact algebra; as every decay lies in (0, 1], no product can overflow.
"""

import math

import torch

from mmvmamba.ops.cross_scan.routes import ROUTES

from .onnx_parameters import Parameters
from .onnx_rows import Keep

PREFIX = 'PrefixScan'
PIECES = (16, 16, 32, 32)  # steps of a piece on each level
MOST_PIXELS = math.prod(PIECES)  # of a map; a runtime refuses the last level's Reshape for more

# (G, L, M): the length of the piece divides L after padding by steps that keep the state
_LEVEL = """
    shape_{l} = Shape (a_{l})
    length_{l} = Gather <axis = 0> (shape_{l}, one)
    width_{l} = Gather <axis = 0> (shape_{l}, two)
    piece_{l} = Constant <value = int64[1] {{{piece}}}> ()
    length_up_{l} = Add (length_{l}, piece_{l})
    length_up_1_{l} = Sub (length_up_{l}, one)
    pieces_{l} = Div (length_up_1_{l}, piece_{l})
    padded_{l} = Mul (pieces_{l}, piece_{l})
    missing_{l} = Sub (padded_{l}, length_{l})
    pads_{l} = Concat <axis = 0> (nothing, nothing, nothing, nothing, missing_{l}, nothing)
    a_padded_{l} = Pad (a_{l}, pads_{l}, keep)
    b_padded_{l} = Pad (b_{l}, pads_{l}, add_none)
    count_{l} = Identity ({pieces})
    by_piece_{l} = Concat <axis = 0> (nothing, count_{l}, piece_{l}, width_{l})
    a_by_piece_{l} = Reshape (a_padded_{l}, by_piece_{l})
    b_by_piece_{l} = Reshape (b_padded_{l}, by_piece_{l})
    {a_parts} = Split <axis = 2> (a_by_piece_{l})
    {b_parts} = Split <axis = 2> (b_by_piece_{l})
"""
_STEP = """
    from_{l}_{i} = Mul (a_{l}_{i}, h_{l}_{j})
    h_{l}_{i} = Add (from_{l}_{i}, b_{l}_{i})
"""
_PRODUCT = """
    p_{l}_{i} = Mul (a_{l}_{i}, p_{l}_{j})
"""
_DOWN = """

    a_{m} = Squeeze (p_{l}_{last}, two)
    b_{m} = Squeeze (h_{l}_{last}, two)
"""
_UP = """
    before_{l} = Slice (h_{m}, nothing, rest, one)
    starts_{l} = Pad (before_{l}, pads_start, add_none)
    start_{l} = Unsqueeze (starts_{l}, two)
"""
_CARRY = """
    carried_{l}_{i} = Mul (p_{l}_{i}, start_{l})
    g_{l}_{i} = Add (h_{l}_{i}, carried_{l}_{i})
"""
_JOIN = """
    h_by_piece_{l} = Concat <axis = 2> ({parts})
    all_{l} = Concat <axis = 0> (nothing, rest, width_{l})
    h_padded_{l} = Reshape (h_by_piece_{l}, all_{l})
    h_{l} = Slice (h_padded_{l}, nothing, length_{l}, one)
"""


def function_text(name: str) -> str:
    """The function of the node ``PrefixScan``: decays and drives (G, L, M) to states (G, L, M)."""
    top = len(PIECES) - 1
    lines = [
        f'<domain: "mmvmamba", opset_import: ["" : 17]>\n{PREFIX} (a_0, b_0) => (h_0) {{',
        'nothing = Constant <value = int64[1] {0}> ()',
        'one = Constant <value = int64[1] {1}> ()',
        'two = Constant <value = int64[1] {2}> ()',
        'rest = Constant <value = int64[1] {-1}> ()',
        'pads_start = Constant <value = int64[6] {0, 1, 0, 0, 0, 0}> ()',
        'keep = Constant <value = float {1.0}> ()',
        'add_none = Constant <value = float {0.0}> ()',
    ]
    for level, piece in enumerate(PIECES):
        parts = {kind: ', '.join(f'{kind}_{level}_{i}' for i in range(piece)) for kind in 'ab'}
        pieces = f'pieces_{level}' if level < top else 'one'
        lines.append(_LEVEL.format(l=level, piece=piece, pieces=pieces, a_parts=parts['a'], b_parts=parts['b']))
        lines.append(f'h_{level}_0 = Identity (b_{level}_0)\n p_{level}_0 = Identity (a_{level}_0)')
        for i in range(1, piece):
            lines.append(_STEP.format(l=level, i=i, j=i - 1))
            lines.append(_PRODUCT.format(l=level, i=i, j=i - 1) if level < top else '')
        lines.append(_DOWN.format(l=level, m=level + 1, last=piece - 1) if level < top else '')
    for level in range(top, -1, -1):
        steps = range(PIECES[level])
        if level < top:
            lines.append(_UP.format(l=level, m=level + 1))
            lines += [_CARRY.format(l=level, i=i) for i in steps]
        kind = 'g' if level < top else 'h'
        lines.append(_JOIN.format(l=level, parts=', '.join(f'{kind}_{level}_{i}' for i in steps)))
    return '\n'.join([*lines, '}'])


class _PrefixScan(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t along the second of three dimensions; while tracing only the output's shape counts."""

    @staticmethod
    def forward(ctx, a, b):
        return b.clone()

    @staticmethod
    def symbolic(g, a, b):
        type_ = a.type().with_sizes([None] * 3)  # the traced sizes must not be taken for the only ones
        return g.op(f'mmvmamba::{PREFIX}', a, b).setType(type_)


def _softplus(v: torch.Tensor) -> torch.Tensor:
    return torch.maximum(v, torch.log(torch.exp(v.clamp(max=30.0)) + 1.0))


def scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode) -> torch.Tensor:
    """The scan of a map (B, D, H, W) to be traced; arguments as in :func:`mmvmamba.layers.scan_routes`."""
    own = Parameters(x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    routes = ROUTES[scan_mode]
    columns = own.rank + 2 * own.states
    x = Keep.apply(x.permute(0, 2, 3, 1))
    batch, height, width, _ = x.shape

    def in_order(value, route):  # (B, H, W, C) to (L, B, C)
        column, reverse = route
        steps = value.permute(2, 1, 0, 3) if column else value.permute(1, 2, 0, 3)
        return steps.flatten(0, 1).flip(0) if reverse else steps.flatten(0, 1)

    u = torch.stack([in_order(x, route) for route in routes])  # (K, L, B, D)
    products = torch.matmul(x, own.projection).split(columns, dim=3)
    maps = torch.stack([in_order(part, route) for part, route in zip(products, routes)]).flatten(1, 2)
    dt, B, C = maps.split([own.rank, own.states, own.states], dim=2)  # (K, L * B, ...)
    v = torch.matmul(dt, torch.from_numpy(own.dt_weight.copy())) + torch.from_numpy(own.dt_bias[:, None])
    delta = _softplus(v).unsqueeze(1)  # (K, 1, L * B, D)
    decay = torch.exp(delta * torch.from_numpy(own.A[:, :, None]))  # (K, N, L * B, D)
    drive = delta * u.flatten(1, 2).unsqueeze(1) * B.transpose(1, 2).unsqueeze(3)
    shape = (len(routes) * own.states, height * width, batch * len(own.skip))
    h = _PrefixScan.apply(decay.reshape(shape), drive.reshape(shape)).reshape(decay.shape)
    y = (h * C.transpose(1, 2).unsqueeze(3)).sum(1)  # (K, L * B, D)

    out = x * own.skip
    for k, (column, reverse) in enumerate(routes):
        steps = y[k].reshape(height * width, batch, -1)
        steps = steps.flip(0) if reverse else steps
        if column:
            out = out + steps.reshape(width, height, batch, -1).permute(2, 1, 0, 3)
        else:
            out = out + steps.reshape(height, width, batch, -1).permute(2, 0, 1, 3)
    return Keep.apply(out).permute(0, 3, 1, 2)

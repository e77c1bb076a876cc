"""The selective scan in standard ONNX operators: ``Scan`` nodes along the rows and the columns of a map.

A route is a sequence of lines, so that a Scan walks through the pixels of all lines side by side, as many steps as a
line has.  Three of them are exact for any decay: the first starts each line with a state of zero and gives what its
end adds; the second carries the states from line to line, the decay of a whole line being exp(A * sum of delta); the
third starts each line with its true state.  All a step computes stays in the processor's cache; opposite routes share
a step, and reading and writing backwards costs no copy.
"""

import numpy as np
import torch
import torch.nn.functional as F

from mmvmamba.ops.cross_scan.routes import ROUTES

from .onnx_heads import AnySize
from .onnx_parameters import Parameters

# delta = max(v, log(1 + exp(min(v, 30)))), since onnxruntime computes Softplus number by number
PREFIX = 'Lines_'
_LINE = """
<domain: "mmvmamba", opset_import: ["" : 17]>
{name} (x, dt, b, c, weight, a, lines) => (y) {{
    floor = Constant <value = float {{-3.4e38}}> ()
    most = Constant <value = float {{30.0}}> ()
    one = Constant <value = float {{1.0}}> ()
    rest = Constant <value = int64[1] {{-1}}> ()
    groups = Constant <value = int64[1] {{{states_of_group}}}> ()
    sums = Constant <value = int64[2] {{0, 1}}> ()
    x_shape = Shape <start = 3> (x)
    a_shape = Shape <start = 0, end = 2> (a)
    state_shape = Concat <axis = 0> (a_shape, x_shape)
    one_group = Constant <value = int64[2] {{{groups}, 1}}> ()
    delta_shape = Concat <axis = 0> (one_group, x_shape)
    zeros = ConstantOfShape <value = float[1] {{0.0}}> (state_shape)
    no_delta = ConstantOfShape <value = float[1] {{0.0}}> (delta_shape)
    h_end, delta_sum, decays, drives = Scan <num_scan_inputs = {first_inputs}, scan_input_directions = [{directions}],
    body = first (
        float[?, ?, ?, ?] h_before, float[?, ?, ?, ?] sum_before, {x_inputs},
        float[?, ?, ?, ?] dt_t, float[?, ?, ?, ?] b_t
    ) => (
        float[?, ?, ?, ?] h_after, float[?, ?, ?, ?] sum_after, float[?, ?, ?, ?] decay, float[?, ?, ?, ?] drive
    ) {{
        u = {u}
        v = MatMul (dt_t, weight)
        v_low = Clip (v, floor, most)
        v_exp = Exp (v_low)
        v_exp_1 = Add (v_exp, one)
        v_log = Log (v_exp_1)
        delta = Max (v, v_log)
        exponent = Mul (delta, a)
        decay = Exp (exponent)
        delta_u = Mul (delta, u)
        drive = Mul (delta_u, b_t)
        h_decayed = Mul (decay, h_before)
        h_after = Add (h_decayed, drive)
        sum_after = Add (sum_before, delta)
    }}> (zeros, no_delta, {xs}, dt, b)

    line_exponent = Mul (delta_sum, a)
    line_decay = Exp (line_exponent)
    by_line = Concat <axis = 0> (groups, lines, rest)
    p_line = Reshape (line_decay, by_line)
    h_line = Reshape (h_end, by_line)
{carry}
    h_start = Reshape (h_starts, state_shape)

    h_last, {y_outputs} = Scan <num_scan_inputs = 3, scan_output_directions = [{y_directions}], body = second (
        float[?, ?, ?, ?] h_0, float[?, ?, ?, ?] decay_t, float[?, ?, ?, ?] drive_t, float[?, ?, ?, ?] c_t
    ) => (float[?, ?, ?, ?] h_1, {y_bodies}) {{
        h_0_decayed = Mul (decay_t, h_0)
        h_1 = Add (h_0_decayed, drive_t)
        states = Mul (h_1, c_t)
{outputs}
    }}> (h_start, decays, drives, c)
    y = {y}
}}
"""

_CARRY_INPUTS = 'p_line_{d}, h_line_{d}'
_CARRY = """
    no_line = Shape <start = 2> (p_line)
    part = Constant <value = int64[1] {{{part}}}> ()
    none_shape = Concat <axis = 0> (part, no_line)
    none = ConstantOfShape <value = float[1] {{0.0}}> (none_shape)
{split}
    {last}, {starts} = Scan <num_scan_inputs = {inputs}, scan_input_axes = [{in_axes}],
    scan_input_directions = [{in_directions}], scan_output_axes = [{out_axes}],
    scan_output_directions = [{out_directions}], body = carry (
        {states}, {values}
    ) => ({after}, {given}) {{
{nodes}
    }}> ({none}, {arguments})
    h_starts = {joined}
"""


def function_text(name: str) -> str:
    """The function of a node ``Lines_<forward>_<backward>_<states>``, which scans lines along so many routes."""
    forward, backward, states = (int(number) for number in name.split('_')[1:])
    ways = ['f'] * bool(forward) + ['b'] * bool(backward)
    every = ['f'] * forward + ['b'] * backward
    several = states > 1 or forward > 1
    y_names = ['y_forward', 'y_backward'][: len(ways)]
    parts = [f'part_{way}' for way in ways] if len(ways) > 1 else ['states']
    lines = [f'{", ".join(parts)} = Split <axis = 0> (states)'] if len(ways) > 1 else []
    lines += [f'y_{way} = {"ReduceSum" if several else "Identity"} ({part}{", sums" if several else ""})'
              for way, part in zip(ways, parts)]  # fmt: skip
    return _LINE.format(
        name=name,
        groups=forward + backward,
        states_of_group=(forward + backward) * states,
        first_inputs=2 + len(ways),
        directions=', '.join(['0', '1'][: len(ways)] + ['0', '0']),
        x_inputs=', '.join(f'float[?, ?, ?, ?] x_{way}' for way in ways),
        u=f'Concat <axis = 0> ({", ".join("x_" + way for way in every)})' if backward else 'Identity (x_f)',
        xs=', '.join('x' for _ in ways),
        carry=_carry_text(ways, (forward + backward) * states // len(ways)),
        y_outputs=', '.join(y_names),
        y_directions=', '.join(['0', '1'][: len(ways)]),
        y_bodies=', '.join(f'float[?, ?, ?, ?] y_{way}' for way in ways),
        outputs='\n'.join(' ' * 8 + line for line in lines),
        y=f'Add ({", ".join(y_names)})' if backward else f'Identity ({y_names[0]})',
    )


def _carry_text(ways: list, part: int) -> str:
    def of_each(*forms: str, join: str = ', ') -> str:
        return join.join(form.format(d=way) for way in ways for form in forms)

    nodes = [
        'c_decayed_{d} = Mul (p_{d}, c_{d})',
        'c_after_{d} = Add (c_decayed_{d}, h_{d})',
        'c_given_{d} = Identity (c_{d})',
    ]
    names = [f'{of_each(kind + "_line_{d}")} = Split <axis = 0> ({kind}_line)' for kind in 'ph']
    if len(ways) == 1:
        names = [f'{kind}_line_f = Identity ({kind}_line)' for kind in 'ph']
    return _CARRY.format(
        part=part,
        split='\n'.join(' ' * 4 + line for line in names),
        last=of_each('c_last_{d}'),
        starts=of_each('h_start_{d}'),
        inputs=2 * len(ways),
        in_axes=of_each('1', '1'),
        in_directions=', '.join(['0, 0', '1, 1'][: len(ways)]),
        out_axes=of_each('1'),
        out_directions=', '.join(['0', '1'][: len(ways)]),
        states=of_each('float[?, ?] c_{d}'),
        values=of_each('float[?, ?] p_{d}', 'float[?, ?] h_{d}'),
        after=of_each('float[?, ?] c_after_{d}'),
        given=of_each('float[?, ?] c_given_{d}'),
        nodes=of_each(*(' ' * 8 + node for node in nodes), join='\n'),
        none=of_each('none'),
        arguments=of_each('p_line_{d}', 'h_line_{d}'),
        joined=f'Concat <axis = 0> ({of_each("h_start_{d}")})' if len(ways) > 1 else 'Identity (h_start_f)',
    )


class _Lines(torch.autograd.Function):
    """All lines of a map along some routes as one node; while tracing only the shape of its output counts."""

    @staticmethod
    def forward(ctx, x, dt, b, c, weight, a, lines, name):
        return x.clone()

    @staticmethod
    def symbolic(g, x, dt, b, c, weight, a, lines, name):
        type_ = x.type().with_sizes([None] * 5)  # the traced sizes must not be taken for the only ones
        return g.op(f'mmvmamba::{name}', x, dt, b, c, weight, a, lines).setType(type_)


def scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode) -> torch.Tensor:
    """The scan of a map (B, D, H, W) to be traced; arguments as in :func:`mmvmamba.layers.scan_routes`."""
    own = Parameters(x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    last = x.permute(0, 2, 3, 1)
    projections = torch.matmul(last, own.projection)  # (B, H, W, K * (R + 2N))
    weight = np.concatenate([own.dt_weight, own.dt_bias[:, None]], axis=1)[:, None]  # (K, 1, R + 1, D)
    out = last * own.skip
    table = ROUTES[scan_mode]
    for by_column in sorted({column for column, _ in table}):
        picked = sorted((k for k in range(len(table)) if table[k][0] == by_column), key=lambda k: table[k][1])
        backward = sum(table[k][1] for k in picked)
        order = (1, 2, 0, 3) if by_column else (2, 1, 0, 3)  # step, line, image
        xs = last.permute(order)
        lines = torch._shape_as_tensor(xs)[1:2]
        maps = projections.permute(order).flatten(1, 2).unflatten(2, (len(table), -1))
        maps = torch.stack([maps[:, :, k].flip(0) if table[k][1] else maps[:, :, k] for k in picked], dim=1)
        dt, B, C = maps.split([own.rank, own.states, own.states], dim=3)  # (steps, routes, lines * images, ...)
        y = _Lines.apply(
            xs.flatten(1, 2).unsqueeze(1).unsqueeze(1),
            F.pad(dt, (0, 1), value=1.0).unsqueeze(2),
            B.transpose(2, 3).unsqueeze(4),
            C.transpose(2, 3).unsqueeze(4),
            torch.from_numpy(weight[picked]),
            torch.from_numpy(own.A[picked][:, :, None]),
            lines,
            f'Lines_{len(picked) - backward}_{backward}_{own.states}',
        )
        y = y.reshape(xs.shape)
        out = out + y.permute(2, 0, 1, 3) if by_column else out + y.permute(2, 1, 0, 3)
    return AnySize.apply(out.permute(0, 3, 1, 2))

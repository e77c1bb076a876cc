"""The selective scan in standard ONNX operators: ``Scan`` nodes along the rows and the columns of a map.

A route is a sequence of lines, so that a Scan walks through the pixels of all lines side by side, as many steps as a
line has.  Three of them are exact for any decay: the first starts each line with a state of zero and gives what its
end adds; the second carries the states from line to line, the decay of a whole line being exp(A * sum of delta); the
third starts each line with its true state.  What a step computes stays in the processor's cache; opposite routes share
a step, and reading and writing backwards costs no copy.
"""

import numpy as np
import torch

from mmvmamba.ops.cross_scan.routes import ROUTES

from .onnx_parameters import Parameters

PREFIX = 'Lines_'
# Letters: G routes, N states, M lines of all images, D channels, R the rank of delta.
# States are the first factors of their products: at fixed sizes OpenVINO 2026.4 overwrites a second one.
# delta = max(v, log(1 + exp(min(v, 30)))), since onnxruntime computes Softplus number by number.
_LINES = """
<domain: "mmvmamba", opset_import: ["" : 17]>
{name} (steps, projection, shift, weight, a) => (y) {{
    floor = Constant <value = float {{-3.4e38}}> ()
    most = Constant <value = float {{30.0}}> ()
    one = Constant <value = float {{1.0}}> ()
    sums = Constant <value = int64[2] {{0, 1}}> ()
    parts = Constant <value = int64[3] {{{dt_columns}, {states}, {states}}}> ()
    groups = Constant <value = int64[1] {{{all_states}}}> ()
    one_group = Constant <value = int64[2] {{{routes}, 1}}> ()
    rest = Constant <value = int64[1] {{-1}}> ()
    slices = Constant <value = int64[4] {{0, 1, 1, -1}}> ()
    all_shape = Shape (steps)
    channels = Shape <start = 3> (steps)
    lines = Shape <start = 1, end = 2> (steps)
    slice_shape = Concat <axis = 0> (slices, channels)
    x = Reshape (steps, slice_shape)
    x_shape = Shape <start = 3> (x)
    products = MatMul (x, projection)
    all_maps = Add (products, shift)
    {maps} = {split} (all_maps)

    a_shape = Shape <start = 0, end = 2> (a)
    state_shape = Concat <axis = 0> (a_shape, x_shape)
    delta_shape = Concat <axis = 0> (one_group, x_shape)
    zeros = ConstantOfShape <value = float[1] {{0.0}}> (state_shape)
    no_delta = ConstantOfShape <value = float[1] {{0.0}}> (delta_shape)
    h_end, delta_sum, decays, drives, cs = Scan <num_scan_inputs = {first_inputs},
    scan_input_directions = [{first_directions}], body = first (
        float[?, ?, ?, ?] h_before, float[?, ?, ?, ?] sum_before, {slices}
    ) => (
        float[?, ?, ?, ?] h_after, float[?, ?, ?, ?] sum_after,
        float[?, ?, ?, ?] decay, float[?, ?, ?, ?] drive, float[?, ?, ?, ?] c_t
    ) {{
{together}
        dt, b, c = Split <axis = 3> (maps, parts)
        b_t = {transposed} (b)
        c_t = {transposed} (c)
        v = MatMul (dt, weight)
        v_low = Clip (v, floor, most)
        v_exp = Exp (v_low)
        v_exp_1 = Add (v_exp, one)
        v_log = Log (v_exp_1)
        delta = Max (v, v_log)
        exponent = Mul (delta, a)
        decay = Exp (exponent)
        delta_u = Mul (delta, u)
        drive = Mul (delta_u, b_t)
        h_decayed = Mul (h_before, decay)
        h_after = Add (h_decayed, drive)
        sum_after = Add (sum_before, delta)
    }}> (zeros, no_delta, {sequences})

    line_exponent = Mul (delta_sum, a)
    line_decay = Exp (line_exponent)
    by_line = Concat <axis = 0> (groups, lines, rest)
    p_line = Reshape (line_decay, by_line)
    h_line = Reshape (h_end, by_line)
{in_order}
    a_line = Shape <start = 2> (p_line)
    start_shape = Concat <axis = 0> (groups, a_line)
    nothing = ConstantOfShape <value = float[1] {{0.0}}> (start_shape)
    c_last, c_starts = Scan <num_scan_inputs = 2, scan_input_axes = [1, 1], scan_output_axes = [1], body = carry (
        float[?, ?] c_before, float[?, ?] p_of_line, float[?, ?] h_of_line
    ) => (float[?, ?] c_after, float[?, ?] c_start) {{
        c_decayed = Mul (c_before, p_of_line)
        c_after = Add (c_decayed, h_of_line)
        c_start = Identity (c_before)
    }}> (nothing, p_ordered, h_ordered)
{restored}
    h_start = Reshape (h_starts, state_shape)

    h_last, {results} = Scan <num_scan_inputs = 3, scan_output_directions = [{directions}], body = second (
        float[?, ?, ?, ?] h_0, float[?, ?, ?, ?] decay_t, float[?, ?, ?, ?] drive_t, float[?, ?, ?, ?] c_of_step
    ) => (float[?, ?, ?, ?] h_1, {result_types}) {{
        h_0_decayed = Mul (h_0, decay_t)
        h_1 = Add (h_0_decayed, drive_t)
        y_of_states = Mul (h_1, c_of_step)
{outputs}
    }}> (h_start, decays, drives, cs)
    y_slices = {y}
    y = Reshape (y_slices, all_shape)
}}
"""
_REVERSED = """
    first_line = Constant <value = int64[1] {{-1}}> ()
    last_line = Constant <value = int64[1] {{-9223372036854775807}}> ()
    line_axis = Constant <value = int64[1] {{1}}> ()
    back = Constant <value = int64[1] {{-1}}> ()
    p_f, p_b = Split <axis = 0> (p_line)
    h_f, h_b = Split <axis = 0> (h_line)
    p_back = Slice (p_b, first_line, last_line, line_axis, back)
    h_back = Slice (h_b, first_line, last_line, line_axis, back)
    p_ordered = Concat <axis = 0> (p_f, p_back)
    h_ordered = Concat <axis = 0> (h_f, h_back)
"""
_AS_THEY_ARE = """
    p_ordered = Identity (p_line)
    h_ordered = Identity (h_line)
"""
_RESTORED = """
    c_f, c_back = Split <axis = 0> (c_starts)
    c_b = Slice (c_back, first_line, last_line, line_axis, back)
    h_starts = Concat <axis = 0> (c_f, c_b)
"""


def function_text(name: str) -> str:
    """The function of a node ``Lines_<forward>_<backward>_<N>_<R>``: lines along so many routes."""
    forward, backward, states, rank = (int(number) for number in name.split('_')[1:])
    numbers = dict(f=forward, b=backward) if backward else dict(f=forward)
    ways, routes = list(numbers), forward + backward
    together, parts = [], []
    for way, number in numbers.items():
        own = [f'maps_{way}_{i}' for i in range(number)] if number > 1 else [f'maps_{way}']
        together += [f'{", ".join(own)} = Split <axis = 3> (maps_{way})'] if number > 1 else []
        parts += own
    together.append(f'maps = {_joined(parts)}')
    together.append(f'u = {_joined([f"x_{way}" for way, number in numbers.items() for _ in range(number)])}')
    outputs = [f'y_way_{way} = {"ReduceSum" if states * forward > 1 else "Identity"} '
               f'(y_part_{way}{", sums" if states * forward > 1 else ""})' for way in ways]  # fmt: skip
    split = f'{", ".join(f"y_part_{way}" for way in ways)} = Split <axis = 0> (y_of_states)'
    outputs.insert(0, split if backward else 'y_part_f = Identity (y_of_states)')
    return _LINES.format(
        name=name,
        maps=', '.join(f'projections_{way}' for way in ways),
        split='Split <axis = 4>' if backward else 'Identity',
        dt_columns=rank + 1,
        states=states,
        all_states=routes * states,
        routes=routes,
        first_inputs=2 * len(ways),
        first_directions='0, 0, 1, 1' if backward else '0, 0',
        slices=', '.join(f'float[?, ?, ?, ?] x_{way}, float[?, ?, ?, ?] maps_{way}' for way in ways),
        sequences=', '.join(f'x, projections_{way}' for way in ways),
        together='\n'.join(' ' * 8 + line for line in together),
        transposed='Transpose <perm = [0, 3, 2, 1]>' if states > 1 else 'Identity',
        in_order=_REVERSED.format()
        if backward
        else '    p_ordered = Identity (p_line)\n    h_ordered = Identity (h_line)',
        restored=_RESTORED if backward else '    h_starts = Identity (c_starts)',
        results=', '.join(f'y_{way}' for way in ways),
        directions=', '.join(['0', '1'][: len(ways)]),
        result_types=', '.join(f'float[?, ?, ?, ?] y_way_{way}' for way in ways),
        outputs='\n'.join(' ' * 8 + line for line in outputs),
        y='Add (y_f, y_b)' if backward else 'Identity (y_f)',
    )


def _joined(names: list) -> str:
    return f'Concat <axis = 0> ({", ".join(names)})' if len(names) > 1 else f'Identity ({names[0]})'


KEEP = """
<domain: "mmvmamba", opset_import: ["" : 17]>
Keep (x) => (y) {
    shape = Shape (x)
    y = Reshape (x, shape)
}
"""


class Keep(torch.autograd.Function):
    """A channel-last map as it is; onnxruntime merges no transposition with one on the other side.

    A single one between channel-first maps and lines moves number by number, two of them move whole pixels.
    """

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def symbolic(g, x):
        return g.op('mmvmamba::Keep', x).setType(x.type().with_sizes([None] * 4))


class _Lines(torch.autograd.Function):
    """All lines of a map along some routes as one node; while tracing only the shape of its output counts."""

    @staticmethod
    def forward(ctx, name, steps, *parameters):
        return steps.clone()

    @staticmethod
    def symbolic(g, name, steps, *parameters):
        type_ = steps.type().with_sizes([None] * 4)  # the traced sizes must not be taken for the only ones
        return g.op(f'mmvmamba::{name}', steps, *parameters).setType(type_)


def scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode) -> torch.Tensor:
    """The scan of a map (B, D, H, W) to be traced; arguments as in :func:`mmvmamba.layers.scan_routes`."""
    own = Parameters(x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    routes = ROUTES[scan_mode]
    # a last column of delta's projection that is 1 at every pixel, whose weights are the bias
    weight = np.concatenate([own.dt_weight, own.dt_bias[:, None]], axis=1)[:, None]  # (K, 1, R + 1, D)
    projection = own.projection.numpy().reshape(len(own.skip), len(routes), -1)
    projection = np.insert(projection, own.rank, 0, axis=2)  # (D, K, R + 1 + 2N)
    shift = np.zeros_like(projection[0])
    shift[:, own.rank] = 1

    x = Keep.apply(x.permute(0, 2, 3, 1))
    out = x * own.skip
    for by_column in sorted({column for column, _ in routes}):
        ways = [[k for k, route in enumerate(routes) if route == (by_column, reverse)] for reverse in (False, True)]
        every = ways[0] + ways[1]
        order = (1, 2, 0, 3) if by_column else (2, 1, 0, 3)  # step, line, image
        y = _Lines.apply(
            f'{PREFIX}{len(ways[0])}_{len(ways[1])}_{own.states}_{own.rank}',
            x.permute(order),
            torch.from_numpy(projection[:, every].reshape(len(own.skip), -1)),
            torch.from_numpy(shift[every].reshape(-1)),
            torch.from_numpy(weight[every]),
            torch.from_numpy(own.A[every][:, :, None]),
        )
        out = out + y.permute((2, 0, 1, 3) if by_column else (2, 1, 0, 3))
    return Keep.apply(out).permute(0, 3, 1, 2)

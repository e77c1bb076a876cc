"""The selective scan as attention: with which weight each pixel reads every other one.

Unrolling the recurrence h_i = exp(delta_i A) h_{i-1} + delta_i B_i u_i, y_i = C_i^T h_i + D u_i (equations 2a and 2b of
`Mamba <https://arxiv.org/abs/2312.00752>`_) gives a causal linear attention along a route, as in section 4.4 of `VMamba
<https://arxiv.org/abs/2401.10166>`_:

    y_i = sum_{j <= i} a_ij u_j + D u_i,    a_ij = C_i^T w_ij B_j delta_j,    w_ij = exp(A sum_{j < t <= i} delta_t)

Each channel has its own weights; those of a head of Mamba-2 share A and delta. The merged map of SS2D is the sum over
the four routes, so its weights are too.

The published code draws five forms of it, here under its names (``FORMS``). The paper's values are delta_j u_j, which
CwBw are the weights of. The decays w are taken from differences of sums and do not overflow.
"""

import copy
from dataclasses import dataclass
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import nn

from mmvmamba.layers import intercept_scan, scan_routes
from mmvmamba.ops import cross_scan

EXACT = 'CwBdtw'  # the form whose weights give the output
FORMS = {  # the published names, and what they are: sums over states
    'CB': 'C B',
    'CBdt': 'C B delta',
    'CwBw': 'C w B',
    EXACT: 'C w B delta',
    'ww': 'w',
}
MAX_PIXELS = 4096  # of a matrix: four routes of more than that are over 256 MB


@dataclass(frozen=True)
class ScanAttention:
    """How one pixel reads a map, all in float64.

    Attributes:
        position (tuple[int, int]): Row and column of the pixel in the map.
        form (str): A key of ``FORMS``.
        weights (Tensor): Those of every route, channel and pixel that is read, (K, D, H, W).
        skip (Tensor): What the skip connections add to the pixel's weight of itself, (D,): D summed over routes.
        x (Tensor): The map that is read, (D, H, W).
        y (Tensor): What the op returned at the pixel, (D,).
    """

    position: tuple
    form: str
    weights: torch.Tensor
    skip: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor

    def error(self) -> float:
        """Largest difference between the weighted sum and the op's output, relative to the largest output.

        Raises:
            ValueError: If the form is another than ``CwBdtw``.
        """
        if self.form != EXACT:
            raise ValueError(f'form is {self.form!r}, whose weights do not give the output; expected {EXACT!r}')
        row, column = self.position
        read = torch.einsum('kdhw,dhw->d', self.weights, self.x) + self.skip * self.x[:, row, column]
        return float((read - self.y).abs().max() / self.y.abs().max())

    def raw(self) -> torch.Tensor:
        """Mean over channels of the signed weights: a map of each route, (K, H, W); their sum is the merged one."""
        return self.weights.mean(dim=1)

    def normalized(self) -> tuple:
        """Mean over channels of each pixel's share of |a|, so that a map sums to 1; skip connections are left out.

        Returns:
            tuple[Tensor, Tensor]: A map of each route (K, H, W), and that of the merged weights (H, W).
        """
        merged = self.weights.sum(dim=0).abs()
        return _shares(self.weights.abs()).mean(dim=1), _shares(merged).mean(dim=0)


def _shares(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def record_scan(backbone: nn.Module, stage: int, block: int, x: torch.Tensor) -> dict:
    """Arguments and output of the op that scans an image in a block, all of them float64.

    A hook takes the block's input, and a float64 copy of its SS2D runs on it again.

    Args:
        backbone (VSSMBackbone): The backbone, in eval mode.
        stage (int): Stage of the block; one that ``out_indices`` makes it compute.
        block (int): Place of the block in its stage, from the end if negative.
        x (Tensor): One image, (1, in_channels, H, W).

    Returns:
        dict: ``x`` (1, D, H, W), ``x_proj_weight``, ``dt_projs_weight``, ``dt_projs_bias``, ``A_logs``, ``Ds`` and
        ``scan_mode`` of :func:`mmvmamba.ops.ss2d_scan`, and its ``output`` (1, D, H, W).

    Raises:
        ValueError: If there is no such stage or block, or it has no such op (``scan_mode`` cascade2d).
    """
    op = _find_op(backbone, stage, block)
    inputs, calls = [], []
    handle = op.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        with torch.no_grad():
            backbone(x)
    finally:
        handle.remove()

    def record(*arguments):
        names = ('x', 'x_proj_weight', 'dt_projs_weight', 'dt_projs_bias', 'A_logs', 'Ds', 'scan_mode')
        calls.append(dict(zip(names, arguments), output=scan_routes(*arguments)))
        return calls[-1]['output']

    with intercept_scan(record), torch.no_grad():
        copy.deepcopy(op).double()(inputs[0].double())
    return calls[0]


def _find_op(backbone: Any, stage: int, block: int) -> nn.Module:
    computed = range(max(backbone.out_indices) + 1)
    if stage not in computed:
        raise ValueError(f'stage is {stage}, expected one of {", ".join(map(str, computed))}')
    blocks = backbone.layers[stage].blocks
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(f'block is {block}, expected 0 to {len(blocks) - 1} in stage {stage}')
    if not blocks[block].has_ssm:
        raise ValueError('ssm_ratio is 0, which leaves no scan in a block; expected more')
    op = blocks[block].op
    if op.options.scan_mode == 'cascade2d':
        raise ValueError('scan_mode is cascade2d, whose two passes have no single map of weights; expected another')
    return op


@torch.no_grad()
def scan_attention(call: dict, row: int, column: int, form: str = EXACT) -> ScanAttention:
    """The weights with which a pixel reads the map: the activation map of a query, as VMamba's paper calls it.

    Args:
        call (dict): What :func:`record_scan` returned.
        row (int): Row of the pixel in the map.
        column (int): Its column.
        form (str): A key of ``FORMS``. Default: the one whose weights give the op's output.

    Returns:
        ScanAttention: The weights, exact up to rounding in float64.

    Raises:
        ValueError: If the pixel lies outside the map, or there is no such form.
    """
    _check_form(form)
    x = call['x']
    _, channels, height, width = x.shape
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f'pixel ({row}, {column}) lies outside the map of {height} rows and {width} columns')
    order, parameters = route_order(call), _parameters(call)
    weights = x.new_zeros(len(order), channels, height * width)
    for route, pixels in enumerate(order):
        i = int((pixels == row * width + column).nonzero())
        weights[route][:, pixels[: i + 1]] = _read(form, i, *(values[route] for values in parameters))
    return ScanAttention(
        position=(row, column),
        form=form,
        weights=weights.view(-1, channels, height, width),
        skip=call['Ds'].reshape(-1, channels).sum(dim=0),
        x=x[0],
        y=call['output'][0, :, row, column],
    )


@torch.no_grad()
def attention_matrix(call: dict, form: str = EXACT, progress: Optional[Callable] = None) -> torch.Tensor:
    """How every pixel reads every other one: the attention map of each route, a mean over channels.

    Args:
        call (dict): What :func:`record_scan` returned.
        form (str): A key of ``FORMS``. Default: the one whose weights give the op's output.
        progress (Callable, optional): Called without arguments H times, each time after W of the L pixels.

    Returns:
        Tensor: (K, L, L) float32, L = H W: row i is how pixel i reads, both counted by rows of the map.

    Raises:
        ValueError: If there is no such form, or the map has more than ``MAX_PIXELS`` pixels.
    """
    _check_form(form)
    order = route_order(call)
    routes, pixels = order.shape
    if pixels > MAX_PIXELS:
        raise ValueError(f'the map has {pixels} pixels, expected at most {MAX_PIXELS} for a matrix of all of them')
    parameters = _parameters(call)
    matrix = torch.zeros(routes, pixels, pixels, device=order.device)
    for i in range(pixels):
        for route in range(routes):
            read = _read(form, i, *(values[route] for values in parameters)).mean(dim=0)
            matrix[route, order[route, i], order[route, : i + 1]] = read.float()
        if progress is not None and (i + 1) % call['x'].shape[3] == 0:
            progress()
    return matrix


def route_order(call: dict) -> torch.Tensor:
    """The pixel, counted by rows of the map, at each step of a route: (K, L), int64."""
    x = call['x']
    height, width = x.shape[2:]
    numbers = torch.arange(height * width, dtype=x.dtype, device=x.device).view(1, 1, height, width)
    return cross_scan(numbers, call['scan_mode'])[0, :, 0].long()


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f'form is {form!r}, expected one of {", ".join(FORMS)}')


def _read(form: str, i: int, delta: torch.Tensor, B: torch.Tensor, C: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Weights (D, i + 1) of a route's steps up to i, from delta (D, L), B and C (N, L) and A (D, N)."""
    steps = delta[:, : i + 1]
    pairs = C[:, i : i + 1] * B[:, : i + 1]
    if form.startswith('CB'):
        read = pairs.sum(dim=0).expand_as(steps)
    else:
        elapsed = steps.cumsum(dim=-1)
        decay = torch.exp(A.unsqueeze(-1) * (elapsed[:, -1:] - elapsed).unsqueeze(1))  # (D, N, i + 1)
        pairs = pairs.sum(dim=0, keepdim=True) if A.shape[1] == 1 else pairs  # all states decay alike
        read = decay.sum(dim=1) if form == 'ww' else torch.einsum('nj,dnj->dj', pairs, decay)
    return read * steps if 'dt' in form else read


def _parameters(call: dict) -> tuple:
    """delta (K, D, L), B and C (K, N, L) and A (K, D, N) of what each route reads; A (K, D, 1) of heads."""
    u = call['x'][0].flatten(1)[:, route_order(call)].transpose(0, 1)  # (K, D, L)
    maps, bias, A = call['x_proj_weight'] @ u, call['dt_projs_bias'].unsqueeze(-1), -call['A_logs'].exp()
    if call['dt_projs_weight'] is None:
        heads, channels = call['Ds'].shape[1:]
        d_state = (maps.shape[1] - heads) // 2
        dts, B, C = maps.split([heads, d_state, d_state], dim=1)
        delta = F.softplus(dts + bias).repeat_interleave(channels, dim=1)
        return delta, B, C, A.repeat_interleave(channels, dim=1).unsqueeze(-1)
    d_state = A.shape[1]
    dts, B, C = maps.split([maps.shape[1] - 2 * d_state, d_state, d_state], dim=1)
    return F.softplus(call['dt_projs_weight'] @ dts + bias), B, C, A.view(-1, u.shape[1], d_state)

"""Small SS2D layers with the published names of parameters, built as copies of VMamba's code build them."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from mmvmamba.ops import selective_scan


def four_routes(x):
    """Rows, columns, and both backwards: (B, 4, D, L) of a map (B, D, H, W)."""
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    return torch.stack((rows, columns, rows.flip(-1), columns.flip(-1)), 1)


def back(y, height, width):
    """The routes' outputs (B, 4, D, L) at their pixels, each (B, D, L)."""
    y = torch.cat((y[:, :2], y[:, 2:].flip(-1)), 1)
    columns = [y[:, i].unflatten(2, (width, height)).transpose(2, 3).flatten(2) for i in (1, 3)]
    return y[:, 0], columns[0], y[:, 2], columns[1]


class OldSS2D(nn.Module):
    """The first published layer: its core returns four routes, which the layer adds up and normalises."""

    routes = 4

    def __init__(self, d_model=6, d_state=2, dt_rank=3, expand=2):
        super().__init__()
        inner, K = expand * d_model, self.routes
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.randn(K, dt_rank + 2 * d_state, inner) / inner**0.5)
        self.dt_projs_weight = nn.Parameter(torch.randn(K, inner, dt_rank) / dt_rank**0.5)
        self.dt_projs_bias = nn.Parameter(torch.randn(K, inner))
        self.A_logs = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(K * inner, 1))
        self.Ds = nn.Parameter(torch.ones(K * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.forward_core = self.forward_corev0

    def step_weight(self):
        return self.dt_projs_weight

    def scan(self, x):
        """The routes' outputs (B, K, D, L) of a map."""
        xs = four_routes(x)[:, : self.routes]
        rank, N = self.dt_projs_weight.shape[2], self.A_logs.shape[1]
        rows = torch.einsum('bkdl,kcd->bkcl', xs, self.x_proj_weight)
        dts, Bs, Cs = rows.split([rank, N, N], 2)
        dts = torch.einsum('bkrl,kdr->bkdl', dts, self.step_weight())
        y = selective_scan(
            xs.flatten(1, 2), dts.flatten(1, 2), -self.A_logs.exp(), Bs, Cs, self.Ds, self.dt_projs_bias.flatten(), True
        )  # fmt: skip
        return y.unflatten(1, (self.routes, -1))

    def forward_corev0(self, x):
        return back(self.scan(x), *x.shape[2:])

    def forward(self, x):
        """x (B, H, W, C)."""
        x, z = self.in_proj(x).chunk(2, -1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2)))
        y1, y2, y3, y4 = self.forward_core(x)
        assert y1.dtype == torch.float32
        y = (y1 + y2 + y3 + y4).mT.unflatten(1, x.shape[2:])
        return self.dropout(self.out_proj(self.out_norm(y) * F.silu(z)))


class NewSS2D(OldSS2D):
    """Later layers: the norm is part of the core, which gives a channel-last map."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.forward_core = partial(self.forward_corev2, force_fp32=False)

    def forward_corev2(self, x, force_fp32):
        y = sum(back(self.scan(x), *x.shape[2:]))
        return self.out_norm(y.mT.unflatten(1, x.shape[2:])).to(x.dtype)

    def forward(self, x):
        """x (B, H, W, C)."""
        x, z = self.in_proj(x).chunk(2, -1)
        y = self.forward_core(F.silu(self.conv2d(x.permute(0, 3, 1, 2))))
        return self.out_proj(y * F.silu(z))


class ChannelFirstSS2D(OldSS2D):
    """A layer of maps (B, C, H, W) whose core gives one (B, D, L) and is told a layout by name."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.in_proj = nn.Conv2d(self.in_proj.in_features, self.in_proj.out_features // 2, 1)
        del self.forward_core

    def forward_core(self, x, channel_first=False):
        assert channel_first
        return sum(back(self.scan(x), *x.shape[2:]))

    def forward(self, x):
        """x (B, C, H, W)."""
        x = F.silu(self.conv2d(self.in_proj(x)))
        y = self.forward_core(x, channel_first=True).mT.unflatten(1, x.shape[2:])
        return self.out_proj(self.out_norm(y)).permute(0, 3, 1, 2)


class SharedSS2D(OldSS2D):
    """A layer whose ``dt_projs_weight`` shares memory with the weight that is trained."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        weight = self.dt_projs_weight
        del self.dt_projs_weight
        self.dt_projs = nn.Linear(weight.shape[2], weight.shape[0] * weight.shape[1], bias=False)
        self.dt_projs_weight = self.dt_projs.weight.detach().view(weight.shape)

    def step_weight(self):
        return self.dt_projs.weight.view(self.dt_projs_weight.shape)


class GroupedSS2D(NewSS2D):
    """The latest layer: projections of all routes as modules, and no parameters of their own."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        for name in ('x_proj', 'dt_projs'):
            weight = getattr(self, f'{name}_weight')
            delattr(self, f'{name}_weight')
            module = nn.Conv1d(4 * weight.shape[2], 4 * weight.shape[1], 1, groups=4, bias=False)
            module.weight.data = weight.data.reshape(module.weight.shape)
            setattr(self, name, module)

    def scan(self, x):
        xs, N = four_routes(x), self.A_logs.shape[1]
        rank = self.dt_projs.weight.shape[1]
        rows = self.x_proj(xs.flatten(1, 2)).unflatten(1, (4, -1))
        dts, Bs, Cs = rows.split([rank, N, N], 2)
        return selective_scan(
            xs.flatten(1, 2), self.dt_projs(dts.flatten(1, 2)), -self.A_logs.exp(), Bs, Cs, self.Ds,
            self.dt_projs_bias.flatten(), True,
        ).unflatten(1, (4, -1))  # fmt: skip


class KeptSS2D(GroupedSS2D):
    """As the latest, but the copy of ``dt_projs_weight`` that shares memory was not deleted."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        weight = self.dt_projs.weight
        self.dt_projs_weight = nn.Parameter(weight.data.view(4, -1, weight.shape[1]))


class StaleSS2D(SharedSS2D):
    """A layer whose ``dt_projs_weight`` is a copy of the weight that is trained."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.dt_projs_weight = nn.Parameter(self.dt_projs_weight.clone())


class TwoRouteSS2D(OldSS2D):
    """A layer of two routes."""

    routes = 2

    def forward_corev0(self, x):
        y = self.scan(x)
        return back(torch.cat((y, torch.zeros_like(y)), 1), *x.shape[2:])


class OtherOrderSS2D(OldSS2D):
    """A layer of four routes in another order."""

    def forward_corev0(self, x):
        return super().forward_corev0(x.flip(2))


class SilentSS2D(OldSS2D):
    """A layer whose forward calls its core by another name."""

    def forward(self, x):
        x = self.in_proj(x).chunk(2, -1)[0].permute(0, 3, 1, 2)
        return self.out_proj(sum(self.forward_corev0(x)).mT.unflatten(1, x.shape[2:]))


class StrideSS2D(OldSS2D):
    """A layer for maps of one size only."""

    def forward(self, x):
        if x.shape[1] != 8:
            raise ValueError('this layer takes maps of 8 rows')
        return super().forward(x)


class MessyNormSS2D(NewSS2D):
    """A layer whose core does something of its own after the norm."""

    def forward_corev2(self, x, force_fp32):
        return super().forward_corev2(x, force_fp32) * 1.1

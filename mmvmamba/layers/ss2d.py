"""SS2D: the token mixer of VMamba."""

import math
from typing import Any, Optional

import torch
from torch import nn

from mmvmamba.ops import depthwise_conv_silu
from mmvmamba.ops.checks import autocast_enabled

from .conv_norm import build_out_norm
from .convolution import autocast_dtype, is_plain_depthwise
from .fusion import fusible, is_plain, run_last, to_first, to_last
from .linear import project
from .norm import LayerNorm
from .options import ACTIVATIONS, SS2DOptions
from .scan import scan_routes
from .ssm_init import init_ssd, init_ssm

ROUTES = 4


@fusible
class SS2D(nn.Module):
    """2D selective scan with its projections, figure 3 of `VMamba <https://arxiv.org/abs/2401.10166>`_.

    in_proj, depthwise convolution, activation, scan along four routes, normalisation, gate, out_proj: (B, C, H, W) to
    (B, C, H, W).  Convolution and norm see maps of that form; projections, activations and dropout (B, H, W, C).

    Args:
        d_model (int): Channels C of the input.
        options (SS2DOptions, optional): Everything else. Default: those of VMamba v2, ``ssm_ratio`` 1.
    """

    dt_projs_weight: Optional[nn.Parameter]
    dt_projs_bias: nn.Parameter
    A_logs: nn.Parameter
    Ds: nn.Parameter
    initial_state: torch.Tensor

    def __init__(self, d_model: int, options: Optional[SS2DOptions] = None):
        super().__init__()
        self.options = options = options or SS2DOptions()
        d_inner = int(options.ssm_ratio * d_model)
        if d_inner < 1:
            raise ValueError(f'ssm_ratio is {options.ssm_ratio}, which leaves no channel of {d_model}')
        dt_rank = math.ceil(d_model / 16) if options.dt_rank == 'auto' else int(options.dt_rank)

        self.in_proj = nn.Linear(d_model, d_inner * (1 if options.gate == 'none' else 2), bias=False)
        self.act = ACTIVATIONS[options.act]()
        if options.d_conv > 1:
            conv = nn.Conv2d(
                d_inner,
                d_inner,
                options.d_conv,
                padding=options.d_conv // 2,
                groups=d_inner,
                bias=options.conv_bias,
            )
            # the published key of core ssd is conv2d.1, after a change of layout
            self.conv2d = conv if options.core == 's6' else nn.Sequential(nn.Identity(), conv)
        self.x_proj_weight = nn.Parameter(torch.empty(ROUTES, dt_rank + 2 * options.d_state, d_inner))
        bound = d_inner**-0.5  # the default of nn.Linear
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        self._init_scan(d_inner, dt_rank)
        self.out_norm = build_out_norm(options.out_norm, d_inner)
        self.out_act = nn.GELU() if options.out_act else nn.Identity()
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.dropout = nn.Dropout(options.dropout)

    def _init_scan(self, d_inner: int, dt_rank: int) -> None:
        options = self.options
        if options.core == 's6':
            parameters = init_ssm(options.ssm_init, ROUTES, d_inner, options.d_state, dt_rank)
        elif d_inner % dt_rank:
            raise ValueError(f"dt_rank is {dt_rank}, expected a divisor of the {d_inner} channels for core 'ssd'")
        else:
            parameters = init_ssd(options.ssm_init, ROUTES, dt_rank, d_inner // dt_rank)
            self.register_parameter('dt_projs_weight', None)
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        if options.with_initial_state:
            shape = (1, ROUTES * dt_rank, d_inner // dt_rank, options.d_state)
            self.register_buffer('initial_state', torch.zeros(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return to_first(self.channel_last(to_last(x)))

    def channel_last(self, x: torch.Tensor) -> torch.Tensor:
        """The same on a channel-last map, (B, H, W, C) to (B, H, W, C)."""
        x, gate = self._split_gate(project(self.in_proj, x))
        x = self._convolve(x)
        y = run_last(self.out_norm, self._scan(x), LayerNorm).to(x.dtype)
        y = self.out_act(y)
        if gate is not None:
            y = y * gate
        return self.dropout(project(self.out_proj, y))

    def _convolve(self, x):
        """The depthwise convolution, if there is one, and the activation."""
        if self.options.d_conv == 1:
            return self.act(x)
        conv: Any = self.conv2d
        act = self.act
        if is_plain(act, nn.SiLU) and is_plain_depthwise(conv):
            return depthwise_conv_silu(x, conv.weight, conv.bias, autocast_dtype(x))
        return act(run_last(conv, x))

    def _split_gate(self, x):
        if self.options.gate == 'none':
            return x, None
        x, gate = x.chunk(2, dim=-1)
        return x, self.act(gate) if self.options.gate == 'silu' else gate

    def _scan(self, x: torch.Tensor) -> torch.Tensor:
        if self.options.force_fp32 and x.dtype != torch.float64:
            if not autocast_enabled(x.device.type):
                return self._scan_routes(x.float()).to(x.dtype)
            with torch.autocast(x.device.type, enabled=False):
                return self._scan_routes(x.float())
        return self._scan_routes(x)

    def _scan_routes(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, D) to (B, H, W, D); the ops take maps of shape (B, D, H, W), here with channels_last strides."""
        parameters = (self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds)
        x, scan_mode = x.permute(0, 3, 1, 2), self.options.scan_mode
        if not self.options.with_initial_state:
            return scan_routes(x, *parameters, scan_mode).permute(0, 2, 3, 1)
        first = self.initial_state.expand(len(x), -1, -1, -1).clone()  # which backward reads, after the next line
        y, last = scan_routes(x, *parameters, scan_mode, first)
        self.initial_state.copy_(last.detach().sum(0, keepdim=True))
        return y.permute(0, 2, 3, 1)

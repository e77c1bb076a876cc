"""The layer ``Mamba`` of mamba_ssm, by its published parameter names, on CPU and GPU."""

import math
from typing import Any

import torch
from torch import nn

from mmvmamba.layers.ssm_init import DT_FLOOR, DT_MAX, DT_MIN, draw_steps
from mmvmamba.ops.checks import state_dtype

from .interface import WAY_OUT, mamba_inner_fn

FORK = "the layers of forks differ; put the fork's own mamba_ssm folder on the path, whose compiled names are provided"


class Mamba(nn.Module):
    """Selective state-space mixer of `Mamba <https://arxiv.org/abs/2312.00752>`_, figure 3.

    Args:
        d_model (int): Channels in and out.
        d_state (int): N. Default: 16.
        d_conv (int): Width of the convolution. Default: 4.
        expand (float): Channels of the scan, of those in. Default: 2.
        dt_rank (int | str): R; ``auto`` means d_model / 16, rounded up. Default: ``auto``.
        dt_min, dt_max, dt_init_floor (float): Range of the first step sizes.
        dt_init (str): ``random`` or ``constant`` weights of the step sizes. Default: ``random``.
        dt_scale (float): Scale of those weights. Default: 1.0.
        conv_bias (bool): Whether the convolution has a bias. Default: True.
        bias (bool): Whether the outer projections have one. Default: False.
        use_fast_path (bool): A choice of the original's, which means nothing here.
        layer_idx (int, optional): Kept for callers. Default: None.
        device (torch.device, optional): Of the parameters. Default: None.
        dtype (torch.dtype, optional): Of the parameters; A_log and D are float32. Default: None.
        unknown: Refused.

    Raises:
        TypeError: For an argument that the published layer does not have.
        ValueError: For a ``dt_init`` that is neither.
    """

    def __init__(
        self, d_model, d_state=16, d_conv=4, expand=2, dt_rank='auto', dt_min=DT_MIN, dt_max=DT_MAX, dt_init='random',
        dt_scale=1.0, dt_init_floor=DT_FLOOR, conv_bias=True, bias=False, use_fast_path=True, layer_idx=None,
        device=None, dtype=None, **unknown,
    ):  # fmt: skip
        super().__init__()
        if unknown:
            raise TypeError(f'Mamba: {", ".join(unknown)} is no argument of the published layer; {FORK}')
        if dt_init not in ('random', 'constant'):
            raise ValueError(f'Mamba: dt_init is {dt_init!r}, expected random or constant')
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == 'auto' else dt_rank
        self.use_fast_path, self.layer_idx, self.activation = use_fast_path, layer_idx, 'silu'
        where = dict(device=device, dtype=dtype)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **where)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **where
        )
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **where)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **where)
        A = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(A.log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **where)
        with torch.no_grad():
            bound = self.dt_rank**-0.5 * dt_scale
            if dt_init == 'random':
                self.dt_proj.weight.uniform_(-bound, bound)
            else:
                self.dt_proj.weight.fill_(bound)
            self.dt_proj.bias.copy_(draw_steps((self.d_inner,), dt_min, dt_max, dt_init_floor))
        marked: Any = (self.A_log, self.D, self.dt_proj.bias)  # which callers look for
        marked[0]._no_weight_decay = marked[1]._no_weight_decay = marked[2]._no_reinit = True

    def forward(self, hidden_states, inference_params=None):
        """Mix along time.

        Args:
            hidden_states (Tensor): (batch, L, d_model).
            inference_params (None): Refused otherwise.

        Returns:
            Tensor: (batch, L, d_model).
        """
        if inference_params is not None:
            self._refuse('inference_params')
        xz = self.in_proj(hidden_states).mT
        state = state_dtype(xz.dtype)
        return mamba_inner_fn(
            xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.out_proj.weight,
            self.out_proj.bias, -torch.exp(self.A_log.to(state)), D=self.D.to(state),
            delta_bias=self.dt_proj.bias.to(state),
        )  # fmt: skip

    def step(self, *_):
        """Refused: generation step by step."""
        self._refuse('step')

    def allocate_inference_cache(self, *_, **__):
        """Refused: generation step by step."""
        self._refuse('allocate_inference_cache')

    def _refuse(self, what):
        raise NotImplementedError(f'Mamba: {what}, for generation step by step, has no stand-in; {WAY_OUT}')


def selective_state_update(*_, **__):
    """Refused: one step of a sequence that goes on."""
    raise NotImplementedError(
        f'selective_state_update, for generation step by step, has no stand-in; call the model on whole sequences '
        f'(no cache), or {WAY_OUT}'
    )

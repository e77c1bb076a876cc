"""Options of SS2D and of the MLP, checked once where they enter."""

import math
from dataclasses import dataclass
from typing import Optional, Union

from torch import nn

ACTIVATIONS = dict(silu=nn.SiLU, gelu=nn.GELU, relu=nn.ReLU, sigmoid=nn.Sigmoid)
CHOICES = dict(
    core=('s6', 'ssd'),
    scan_mode=('cross2d', 'unidi', 'bidi', 'cascade2d'),
    gate=('silu', 'linear', 'none'),
    out_norm=('ln', 'none', 'dwconv3', 'cnorm', 'softmax', 'sigmoid'),
    ssm_init=('mamba', 'randn', 'zeros'),
    stem=('patch4', 'conv3x2'),
    downsample=('merge', 'conv2', 'conv3', 'none'),
    norm_layer=('ln', 'ln2d', 'bn'),
    mlp=('mlp', 'gmlp'),
    act=tuple(ACTIVATIONS),
    mlp_act=tuple(ACTIVATIONS),
)


@dataclass(frozen=True)
class SS2DOptions:
    """Options of :class:`mmvmamba.layers.SS2D`.

    Attributes:
        core (str): The scan: ``s6``, the selective scan of Mamba, or ``ssd``, that of Mamba-2, with R
            heads of d_inner / R channels.
        d_state (int): State size N of each channel.
        ssm_ratio (float): d_inner = ssm_ratio * d_model; 0 for a block without token mixer.
        dt_rank (int | str): Rank R of the step-size projection, or number R of heads; ``auto`` is ceil(d_model / 16).
        d_conv (int): Kernel size of the depthwise convolution before the scan, odd; 1 for none.
        conv_bias (bool): Whether that convolution has a bias.
        act (str): Activation after it: silu, gelu, relu or sigmoid. An arch dict with core ``ssd`` has gelu by default.
        dropout (float): Dropout after the output projection.
        scan_mode (str): cross2d, unidi, bidi or, with core ``s6``, cascade2d.
        gate (str): What multiplies the scan's output: ``silu`` (an activated branch of in_proj), ``linear`` (the
            branch as it is) or ``none``.
        out_norm (str): Normalisation of the scan's output: ln, none, dwconv3, cnorm, softmax or sigmoid.
        out_act (bool): Whether a GELU follows ``out_norm``.
        force_fp32 (bool): Whether the projections and the scan run in float32 under autocast.
        ssm_init (str): Initialisation of A, D and dt: mamba, randn or zeros.
        with_initial_state (bool): Whether each call begins with the state that the last one left, added up over its
            batch; with core ``ssd``.
    """

    core: str = 's6'
    d_state: int = 1
    ssm_ratio: float = 1.0
    dt_rank: Union[int, str] = 'auto'
    d_conv: int = 3
    conv_bias: bool = False
    act: str = 'silu'
    dropout: float = 0.0
    scan_mode: str = 'cross2d'
    gate: str = 'none'
    out_norm: str = 'ln'
    out_act: bool = False
    force_fp32: bool = False
    ssm_init: str = 'mamba'
    with_initial_state: bool = False

    def __post_init__(self):
        for name in ('core', 'scan_mode', 'gate', 'out_norm', 'ssm_init', 'act'):
            check_choice(name, getattr(self, name))
        check_int('d_state', self.d_state, 1, 256)
        check_number('ssm_ratio', self.ssm_ratio, low=0, high=64)
        check_number('dropout', self.dropout, low=0, high=1)
        if self.dt_rank != 'auto':
            check_int('dt_rank', self.dt_rank, 1, 2**16)
        check_int('d_conv', self.d_conv, 1, 255)
        if self.d_conv % 2 == 0:
            raise ValueError(f'd_conv is {self.d_conv}, expected an odd kernel size')
        for name in ('conv_bias', 'out_act', 'force_fp32', 'with_initial_state'):
            check_bool(name, getattr(self, name))
        if self.core == 'ssd' and self.scan_mode == 'cascade2d':
            raise ValueError("scan_mode is 'cascade2d', expected cross2d, unidi or bidi for core 'ssd'")
        if self.with_initial_state and self.core != 'ssd':
            raise ValueError(f'with_initial_state is True, expected False for core {self.core!r}, which keeps no state')


def check_choice(name: str, value) -> None:
    """Check that an option has one of its values in :data:`CHOICES`."""
    if value not in CHOICES[name]:
        raise ValueError(f'{name} is {value!r}, expected one of {", ".join(CHOICES[name])}')


def check_int(name: str, value, low: int, high: Optional[int] = None) -> None:
    """Check that an option is an integer of at least ``low`` and at most ``high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} is {value!r}, expected an integer')
    if value < low or (high is not None and value > high):
        raise ValueError(f'{name} is {value}, expected at least {low}' + (f', at most {high}' if high else ''))


def check_number(name: str, value, low: float, high: float = math.inf, low_open: bool = False) -> None:
    """Check that an option is a finite number in [low, high], or in (low, high] if ``low_open``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f'{name} is {value!r}, expected a number')
    if not math.isfinite(value) or not low <= value <= high or (low_open and value == low):
        bounds = f'{"above" if low_open else "at least"} {low}' + (f', at most {high}' if math.isfinite(high) else '')
        raise ValueError(f'{name} is {value}, expected a finite number {bounds}')


def check_bool(name: str, value) -> None:
    """Check that an option is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f'{name} is {value!r}, expected True or False')

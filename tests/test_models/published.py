"""The published structure of the backbone from torch's own layers, which fuses nothing: the reference of module tests.

Its modules have the names of ours, and each takes and gives what it does in our contract.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmvmamba.layers.cascade import cascade_scan
from mmvmamba.layers.heads import scan_heads
from mmvmamba.layers.options import ACTIVATIONS
from mmvmamba.ops import ss2d_scan


def last(x):
    return x.permute(0, 2, 3, 1)


def first(x):
    return x.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    def forward(self, x):
        return first(super().forward(last(x)))


class SpatialSoftmax(nn.Module):
    def forward(self, x):
        return x.flatten(2).softmax(dim=2).view(x.shape)


class PadShort(nn.Module):
    def forward(self, x):
        return nn.functional.pad(x, (0, max(0, 2 - x.shape[3]), 0, max(0, 2 - x.shape[2])))


def build_norm(arch, channels):
    return nn.BatchNorm2d(channels) if arch.norm_layer == 'bn' else ChannelNorm(channels)


class Mixer(nn.Module):
    """SS2D."""

    def __init__(self, channels, ours):
        super().__init__()
        self.options = o = ours.options
        inner = ours.out_proj.in_features
        self.in_proj = nn.Linear(channels, ours.in_proj.out_features, bias=False)
        self.act = ACTIVATIONS[o.act]()
        if o.d_conv > 1:
            self.conv2d = nn.Conv2d(inner, inner, o.d_conv, 1, o.d_conv // 2, groups=inner, bias=o.conv_bias)
            if o.core == 'ssd':
                self.conv2d = nn.Sequential(nn.Identity(), self.conv2d)
        for name, parameter in ours.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))
        conv = nn.Conv2d(inner, inner, 3, 1, 1, groups=inner, bias=False)
        self.out_norm = dict(
            ln=ChannelNorm(inner),
            none=nn.Identity(),
            dwconv3=nn.Sequential(nn.Identity(), conv),
            cnorm=nn.Sequential(ChannelNorm(inner), nn.Identity(), conv),
            softmax=SpatialSoftmax(),
            sigmoid=nn.Sigmoid(),
        )[o.out_norm]
        self.out_act = nn.GELU() if o.out_act else nn.Identity()
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self.dropout = nn.Dropout(o.dropout)

    def forward(self, x):
        x = self.in_proj(last(x))
        if self.options.gate != 'none':
            x, gate = x.chunk(2, dim=-1)
        if self.options.gate == 'silu':
            gate = self.act(gate)
        if self.options.d_conv > 1:
            x = last(self.conv2d(first(x)))
        x = self.act(x)
        if self.options.core == 'ssd':
            y = first(
                scan_heads(x, self.x_proj_weight, self.dt_projs_bias, self.A_logs, self.Ds, self.options.scan_mode)
            )
            return self.finish(y, gate if self.options.gate != 'none' else None)
        parameters = (self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds)
        if self.options.scan_mode == 'cascade2d':
            y = first(cascade_scan(x, *parameters))
        else:
            y = ss2d_scan(first(x), *parameters, self.options.scan_mode)
        return self.finish(y, gate if self.options.gate != 'none' else None)

    def finish(self, y, gate):
        y = self.out_act(last(self.out_norm(y)))
        return first(self.dropout(self.out_proj(y if gate is None else y * gate)))


class Perceptron(nn.Module):
    """Mlp."""

    def __init__(self, arch, channels):
        super().__init__()
        hidden, self.gated = int(arch.mlp_ratio * channels), arch.mlp == 'gmlp'
        self.fc1 = nn.Linear(channels, hidden * (2 if self.gated else 1))
        self.act = ACTIVATIONS[arch.mlp_act]()
        self.fc2 = nn.Linear(hidden, channels)
        self.drop = nn.Dropout(arch.mlp_dropout)

    def forward(self, x):
        x = self.fc1(last(x))
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            return first(self.drop(self.fc2(x * self.act(gate))))
        return first(self.drop(self.fc2(self.drop(self.act(x)))))


class Block(nn.Module):
    """VSSBlock."""

    def __init__(self, arch, channels, ours):
        super().__init__()
        self.post_norm, self.has_ssm = arch.post_norm, arch.ssm.ssm_ratio > 0
        if self.has_ssm:
            self.norm = build_norm(arch, channels)
            self.op = Mixer(channels, ours.op)
        self.drop_path = nn.Identity()
        self.has_mlp, self.with_cp = arch.mlp_ratio > 0, ours.with_cp
        if self.has_mlp:
            self.norm2 = build_norm(arch, channels)
            self.mlp = Perceptron(arch, channels)

    def forward(self, x):
        return checkpoint(self._forward, x, use_reentrant=False) if self.with_cp else self._forward(x)

    def _forward(self, x):
        if self.post_norm:
            x = x + self.drop_path(self.norm(self.op(x))) if self.has_ssm else x
            return x + self.drop_path(self.norm2(self.mlp(x))) if self.has_mlp else x
        x = x + self.drop_path(self.op(self.norm(x))) if self.has_ssm else x
        return x + self.drop_path(self.mlp(self.norm2(x))) if self.has_mlp else x


class Merging(nn.Module):
    """PatchMerging."""

    def __init__(self, arch, channels, out_channels):
        super().__init__()
        self.reduction = nn.Linear(4 * channels, out_channels, bias=False)
        self.norm = build_norm(arch, 4 * channels)

    def forward(self, x):
        x = nn.functional.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        x = torch.cat([x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=1)
        return first(self.reduction(last(self.norm(x))))


class Level(nn.Module):
    """Stage."""

    def __init__(self, arch, i, ours):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(arch, arch.dims[i], block) for block in ours.blocks))
        self.downsample = nn.Identity()
        if not isinstance(ours.downsample, nn.Identity):
            narrow, wide = arch.dims[i : i + 2]
            self.downsample = dict(
                merge=lambda: Merging(arch, narrow, wide),
                conv2=lambda: nn.Sequential(
                    PadShort(), nn.Conv2d(narrow, wide, 2, 2), nn.Identity(), build_norm(arch, wide)
                ),
                conv3=lambda: nn.Sequential(
                    nn.Identity(), nn.Conv2d(narrow, wide, 3, 2, 1), nn.Identity(), build_norm(arch, wide)
                ),
            )[arch.downsample]()

    def forward(self, x):
        return self.blocks(x)


class Published(nn.Module):
    """The published structure with the weights of a backbone, in its mode."""

    def __init__(self, ours):
        super().__init__()
        arch, width = ours.arch, ours.arch.dims[0]
        patch, norm = arch.patch_size, build_norm if arch.patch_norm else lambda arch, channels: nn.Identity()
        if arch.stem == 'patch4':
            stem = [nn.Conv2d(arch.in_channels, width, patch, patch), nn.Identity(), norm(arch, width)]
        else:
            stem = [
                nn.Conv2d(arch.in_channels, width // 2, patch // 2 + 1, patch // 2, 1),
                nn.Identity(),
                norm(arch, width // 2),
                nn.Identity(),
                nn.GELU(),
                nn.Conv2d(width // 2, width, patch // 2 + 1, patch // 2, 1),
                nn.Identity(),
                norm(arch, width),
            ]
        self.patch_embed = nn.Sequential(*stem)
        self.pos_embed = nn.Parameter(ours.pos_embed.detach().clone()) if arch.pos_embed else None
        self.layers = nn.ModuleList(Level(arch, i, stage) for i, stage in enumerate(ours.layers))
        self.out_indices = ours.out_indices
        for i in self.out_indices:
            self.add_module(f'outnorm{i}', build_norm(arch, arch.dims[i]))
        tensor = next(ours.parameters())
        self.to(tensor.device, tensor.dtype).load_state_dict(ours.state_dict())
        self.train(ours.training)

    def forward(self, x):
        x, outs = self.patch_embed(x), []
        if self.pos_embed is not None:
            x = x + nn.functional.interpolate(self.pos_embed, x.shape[2:], mode='bicubic', align_corners=False)
        for i, level in enumerate(self.layers):
            x = level(x)
            if i in self.out_indices:
                outs.append(getattr(self, f'outnorm{i}')(x))
            if i < len(self.layers) - 1:
                x = level.downsample(x)
        return tuple(outs)

"""The rule by which the reference models were filled: each tensor is a function of its name, shape and a seed.

Values are float64 draws of PCG64 seeded with [seed, crc32(name)], scaled by the last part of the name, and rounded once
to float32.
"""

import math
import zlib

import numpy as np
import torch

PARAMETER_SEED = 20240718
IMAGE_SEED = 4242
_UNIT_GAIN = ('.in_proj.weight', '.fc1.weight')
_CONV_GAIN = ('.conv2d.weight', '.conv2d.1.weight', '.oconv2d.weight')


def _generator(*seed):
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(seed))))


def fill_array(name: str, shape: tuple) -> np.ndarray:
    """The float32 values of the tensor that the published code calls ``name``."""
    shape = tuple(shape)
    leaf = name.rpartition('.')[2]
    if leaf == 'num_batches_tracked':
        return np.zeros(shape, dtype=np.int64)
    rng = _generator(PARAMETER_SEED, zlib.crc32(name.encode()))
    if leaf == 'dt_projs_bias':
        low, high = math.log(1e-3), math.log(1e-1)
        dt = np.exp(rng.random(shape) * (high - low) + low)
        return (dt + np.log(-np.expm1(-dt))).astype(np.float32)
    normal = np.asarray(rng.standard_normal(shape))
    fan_in = shape[-1] if shape else 1
    if leaf == 'A_logs':
        value = np.log(np.arange(1.0, fan_in + 1)) + 0.2 * normal
    elif leaf == 'Ds' or (leaf == 'weight' and len(shape) == 1):
        value = 1 + 0.1 * normal
    elif leaf == 'dt_projs_weight':
        value = 0.75 / math.sqrt(fan_in) * normal
    elif leaf == 'x_proj_weight':
        value = 2.0 / math.sqrt(fan_in) * normal
    elif leaf == 'pos_embed':
        value = 0.2 * normal
    elif leaf == 'running_var':
        value = np.exp(0.2 * normal)
    elif leaf in ('initial_state', 'running_mean', 'bias') or leaf.endswith('_bias') or len(shape) < 2:
        value = 0.1 * normal
    else:
        gain = 1.0 if f'.{name}'.endswith(_UNIT_GAIN) else 1.2 if f'.{name}'.endswith(_CONV_GAIN) else 0.5
        value = gain / math.sqrt(math.prod(shape[1:])) * normal
    return np.asarray(value).astype(np.float32)


def fill_module(module: torch.nn.Module, rename=lambda name: name) -> torch.nn.Module:
    """Fill a module in place; ``rename`` gives the published name of one of its tensors."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(torch.from_numpy(fill_array(rename(name), value.shape)))
    return module


def make_input(height: int, width: int, batch: int = 2, channels: int = 3) -> np.ndarray:
    """The reference's images, float32 (batch, channels, H, W)."""
    rng = _generator(IMAGE_SEED, batch, channels, height, width)
    return rng.standard_normal((batch, channels, height, width)).astype(np.float32)

"""Strict loading: every weight of the backbone in its shape, and nothing else but what the task replaces."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Callable

import torch
from mmengine.logging import print_log

from .errors import MisfitError
from .files import read_checkpoint
from .layouts import backbone_weights, select_weights, shorten

_OPTIONS = dict(checkpoint=str, prefix=str, key=str, map_location=None, strict=bool, in_channels=str)

_MASK = 'mask_token'  # only what pretrains by masks has one


@dataclass
class Fitted:
    """Weights that a backbone loads.

    Attributes:
        state (dict): Every weight of the backbone.
        source (str): Where the weights of the file were.
        left_out (list[str]): Names of the file that are not used.
        fresh (list[str]): Names of the backbone that the file lacks, as initialized in ``state``.
        others (dict): Weights of the file that are not of the backbone.
    """

    state: dict
    source: str
    left_out: list
    fresh: list
    others: dict


def load_pretrained(model, init_cfg, unused: Callable = lambda keys: (), adapt: Callable = lambda state: None) -> None:
    """Load a checkpoint into a backbone; one log line says what was loaded and what was left out.

    Args:
        model (VSSMBackbone): The backbone.
        init_cfg (dict): ``type='Pretrained'`` and ``checkpoint``, a path or URL, and optionally

            - ``key``: the place of the weights in the file (default: see :func:`select_weights`),
            - ``prefix``: where the backbone's names begin there (default: see :func:`backbone_weights`),
            - ``in_channels='adapt'``: the first convolution may take another number of channels than the file's, see
              :func:`adapt_channels`,
            - ``strict=False``: load what fits and report the rest; refused if that is less than half of the weights,
            - ``map_location`` (default: ``cpu``).
        unused (Callable): Tells which of the given keys belong to what the backbone was built without. Default: none.
        adapt (Callable): Changes the backbone's state dict in place before it is compared. Default: nothing.

    Raises:
        TypeError: If ``init_cfg`` has an unknown key, or one of a wrong type.
        ValueError: If ``init_cfg`` is of another type than ``Pretrained``.
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file can't be downloaded or read; a MisfitError if its weights don't fit.
    """
    options = _check_init_cfg(init_cfg)
    name = options['checkpoint']
    content = read_checkpoint(name, options.get('map_location', 'cpu'))
    fitted = fit_weights(model.state_dict(), content, name, options, unused, adapt)
    model.load_state_dict(fitted.state, strict=True)
    line = f'Loaded {len(fitted.state) - len(fitted.fresh)} weights from {fitted.source} of {name}'
    if fitted.left_out:
        groups = Counter(key.split('.')[0] for key in fitted.left_out)
        line += '; left out: ' + ', '.join(f'{group} ({count})' for group, count in groups.items())
    if fitted.fresh:
        norms = sorted({key.split('.')[0] if key.startswith('outnorm') else key for key in fitted.fresh})
        line += f'; not in the file, kept as initialized: {shorten(norms)}'
    print_log(line, logger='current')


def fit_weights(expected: dict, content, name: str, options: dict, unused: Callable, adapt: Callable) -> Fitted:
    """Take a backbone's weights out of a checkpoint.

    Args:
        expected (dict): The backbone's own state dict.
        content: What :func:`read_checkpoint` returned.
        name (str): Name of the checkpoint, for errors.
        options (dict): ``key``, ``prefix``, ``strict`` and ``in_channels`` of ``init_cfg``.
        unused (Callable): See :func:`load_pretrained`.
        adapt (Callable): Likewise.

    Returns:
        Fitted: The weights.

    Raises:
        CheckpointError: If there are none; a MisfitError if they don't fit.
    """
    found, source = select_weights(content, name, options.get('key'))
    state, others = backbone_weights(found, name, options.get('prefix'))
    left_out, whole = list(others), dict(state)
    for key in unused(whole):
        del state[key]
        left_out.append(key)
    adapt(state)
    fresh = _match_outnorms(state, expected, left_out)
    if _MASK in state and _MASK not in expected:
        del state[_MASK]
        left_out.append(_MASK)
    elif _MASK in expected and _MASK not in state:
        fresh.append(_MASK)
    first = 'patch_embed.0.weight'
    if options.get('in_channels') == 'adapt' and first in state and state[first].dim() == 4 == expected[first].dim():
        state[first] = adapt_channels(state[first], expected[first].shape[1])
    place = f'checkpoint {name!r}: {source}'
    if options.get('strict', True):
        _check_fit(state, expected, whole, place)
    else:
        fresh += _drop_misfits(state, expected, whole, place, left_out)
    return Fitted({**state, **{key: expected[key] for key in fresh}}, source, left_out, fresh, others)


def adapt_channels(weight: torch.Tensor, in_channels: int) -> torch.Tensor:
    """The weight of a first convolution for another number of channels.

    One channel gets the sum of the weights. More channels than the weight has get its mean behind it, fewer the mean
    alone; all are scaled so that equal channels give the response that they gave before.

    Args:
        weight (Tensor): (out, channels, kh, kw).
        in_channels (int): Channels wanted.

    Returns:
        Tensor: (out, in_channels, kh, kw).
    """
    channels = weight.shape[1]
    if in_channels == channels:
        return weight
    mean = weight.float().mean(1, keepdim=True)
    if in_channels < channels:
        wide = mean.expand(-1, in_channels, -1, -1)
    else:
        wide = torch.cat([weight.float(), mean.expand(-1, in_channels - channels, -1, -1)], 1)
    return (wide * (channels / in_channels)).to(weight.dtype)


def _check_init_cfg(init_cfg) -> dict:
    if isinstance(init_cfg, (list, tuple)) and len(init_cfg) == 1:
        init_cfg = init_cfg[0]
    if not isinstance(init_cfg, dict):
        raise TypeError(f"init_cfg is a {type(init_cfg).__name__}, expected dict(type='Pretrained', checkpoint=...)")
    kind = init_cfg.get('type')
    if kind not in ('Pretrained', 'PretrainedInit') and getattr(kind, '__name__', None) != 'PretrainedInit':
        raise ValueError(f"init_cfg has type {kind!r}, expected 'Pretrained'; without init_cfg the weights are random")
    unknown = sorted(set(init_cfg) - {'type', *_OPTIONS})
    if unknown:
        raise TypeError(f'init_cfg has unknown keys {", ".join(unknown)}; known are type, {", ".join(_OPTIONS)}')
    for key, expected in _OPTIONS.items():
        value = init_cfg.get(key)
        if expected and not isinstance(value, expected) and not (key != 'checkpoint' and value is None):
            raise TypeError(f'{key} of init_cfg is {value!r}, expected a {"string" if expected is str else "bool"}')
    if init_cfg.get('in_channels') not in (None, 'adapt'):
        raise ValueError(f"in_channels of init_cfg is {init_cfg['in_channels']!r}, expected 'adapt'")
    return {key: value for key, value in init_cfg.items() if value is not None}


def _match_outnorms(state: dict, expected: dict, left_out: list) -> list:
    """Keep the file's output norms only if it has all of the model's; return the keys that stay as initialized.

    A classifier's file has the last one only, trained for the classifier: tasks that need more start with all new.
    """
    wanted = [key for key in expected if key.startswith('outnorm')]
    complete = all(key in state for key in wanted)
    for key in [key for key in state if key.startswith('outnorm') and not (complete and key in expected)]:
        del state[key]
        left_out.append(key)
    return [] if complete else wanted


def _drop_misfits(state: dict, expected: dict, whole: dict, place: str, left_out: list) -> list:
    """Keep what fits; return the keys that stay as initialized."""
    for key in [key for key, value in state.items() if not (key in expected and _alike(value, expected[key]))]:
        del state[key]
        left_out.append(key)
    missing = [key for key in expected if key not in state and not _is_optional(key)]
    needed = sum(not _is_optional(key) for key in expected)
    if 2 * (needed - len(missing)) < needed:
        problems = f'fit in {needed - len(missing)} of {needed} places only, expected at least half for strict=False'
        raise MisfitError(
            place, problems, {key: value.shape for key, value in whole.items()}, f'it has {_describe(whole)}'
        )
    return missing


def _is_optional(key: str) -> bool:
    return key.startswith('outnorm') or key == _MASK


def _alike(value: torch.Tensor, expected: torch.Tensor) -> bool:
    kinds = value.is_floating_point() == expected.is_floating_point() and value.layout == torch.strided
    return kinds and value.shape == expected.shape


def _check_fit(state: dict, expected: dict, whole: dict, place: str) -> None:
    expected = {key: value for key, value in expected.items() if key in state or not _is_optional(key)}
    problems = []
    missing = [key for key in expected if key not in state]
    if missing:
        problems.append(f'{len(missing)} missing: {shorten(missing)}')
    unexpected = [key for key in state if key not in expected]
    if unexpected:
        problems.append(f'{len(unexpected)} unexpected: {shorten(unexpected)}')
    common = [key for key in expected if key in state]
    shapes = [
        f'{key} {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}'
        for key in common
        if state[key].shape != expected[key].shape
    ]
    if shapes:
        problems.append(f'{len(shapes)} of other shapes: {shorten(shapes, "; ")}')
    kinds = [
        f'{key} {state[key].dtype} {state[key].layout}'
        for key in common
        if state[key].is_floating_point() != expected[key].is_floating_point() or state[key].layout != torch.strided
    ]
    if kinds:
        problems.append(f'{len(kinds)} of other kinds: {shorten(kinds)}')
    if problems:
        found = {key: value.shape for key, value in whole.items()}
        raise MisfitError(place, '. '.join(problems), found, f'it has {_describe(whole)}')


def _describe(state: dict) -> str:
    """Depths and widths of a backbone's state dict, as far as they can be told."""
    matches = (re.match(r'layers\.(\d{1,4})\.blocks\.(\d{1,4})\.', key) for key in state)
    blocks = {match.groups() for match in matches if match}
    depths = Counter(int(stage) for stage, _ in blocks)
    norms = [state.get(f'layers.{stage}.blocks.0.norm.weight') for stage in sorted(depths)]
    dims = tuple(None if norm is None else norm.shape[0] for norm in norms)
    return f'depths {tuple(depths[stage] for stage in sorted(depths))}, dims {dims}'

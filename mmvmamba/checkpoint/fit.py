"""Strict loading: every weight of the backbone in its shape, and nothing else but what the task replaces."""

import re
from collections import Counter
from typing import Callable

import torch
from mmengine.logging import print_log

from .errors import MisfitError
from .files import read_checkpoint
from .layouts import backbone_weights, select_weights, shorten

_OPTIONS = ('type', 'checkpoint', 'prefix', 'map_location')


def load_pretrained(model, init_cfg, unused: Callable = lambda keys: (), adapt: Callable = lambda state: None) -> None:
    """Load a checkpoint into a backbone; one log line says what was loaded and what was left out.

    Args:
        model (VSSMBackbone): The backbone.
        init_cfg (dict): ``type='Pretrained'`` and ``checkpoint``, a path or URL; optionally ``prefix``, where the
            backbone's keys begin in the file (found without it if that is ``backbone.`` or nothing), and
            ``map_location`` (default: ``cpu``).
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
    state, source = select_weights(content, name)
    state, left_out = backbone_weights(state, name, options.get('prefix'))
    expected, whole = model.state_dict(), dict(state)
    for key in unused(whole):
        del state[key]
        left_out.append(key)
    adapt(state)
    fresh = _match_outnorms(state, expected, left_out)
    _check_fit(state, expected, whole, f'checkpoint {name!r}: {source}')
    model.load_state_dict({**state, **{key: expected[key] for key in fresh}}, strict=True)

    line = f'Loaded {len(state)} weights from {source} of {name}'
    if left_out:
        groups = Counter(key.split('.')[0] for key in left_out)
        line += '; left out: ' + ', '.join(f'{group} ({count})' for group, count in groups.items())
    if fresh:
        norms = sorted({key.split('.')[0] for key in fresh})
        line += f'; not in the file, kept as initialized: {", ".join(norms)}'
    print_log(line, logger='current')


def _check_init_cfg(init_cfg) -> dict:
    if isinstance(init_cfg, (list, tuple)) and len(init_cfg) == 1:
        init_cfg = init_cfg[0]
    if not isinstance(init_cfg, dict):
        raise TypeError(f"init_cfg is a {type(init_cfg).__name__}, expected dict(type='Pretrained', checkpoint=...)")
    kind = init_cfg.get('type')
    if kind not in ('Pretrained', 'PretrainedInit') and getattr(kind, '__name__', None) != 'PretrainedInit':
        raise ValueError(f"init_cfg has type {kind!r}, expected 'Pretrained'; without init_cfg the weights are random")
    unknown = sorted(set(init_cfg) - set(_OPTIONS))
    if unknown:
        raise TypeError(f'init_cfg has unknown keys {", ".join(unknown)}; known are {", ".join(_OPTIONS)}')
    for key in ('checkpoint', 'prefix'):
        value = init_cfg.get(key)
        if not isinstance(value, str) and not (key == 'prefix' and value is None):
            raise TypeError(f'{key} of init_cfg is {value!r}, expected a string')
    return dict(init_cfg)


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


def _check_fit(state: dict, expected: dict, whole: dict, place: str) -> None:
    expected = {key: value for key, value in expected.items() if key in state or not key.startswith('outnorm')}
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

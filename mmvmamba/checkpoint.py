"""Pretrained weights of a backbone: from whichever file they come in, loaded strictly.

``init_cfg=dict(type='Pretrained', checkpoint=path_or_url)`` takes

- official classification files of VMamba: ``model``, and ``model_ema`` which is preferred if its accuracy is recorded;
- files saved by OpenMMLab: ``state_dict`` of a backbone, classifier, detector or segmentor, whose backbone is taken out
  (with ``EMAHook``, mmengine saves the averaged weights under that name);
- bare state dicts of any of them.

Every weight of the backbone must be there in its shape, and nothing else but stages after the last of ``out_indices``,
which are not built, and what the task replaces: the classifier, and the norms of the output maps (``outnorm*``) when the file lacks some of those that the model has.  Anything else is
a :class:`CheckpointError`, never a model with random weights.  Reading is :mod:`mmvmamba.checkpoint_file`'s part.
"""

import functools
import re
from collections import Counter

import torch
from mmengine.logging import print_log

from mmvmamba.checkpoint_file import CheckpointError, find_damage, read_checkpoint, write_checkpoint

__all__ = [
    'CheckpointError',
    'backbone_weights',
    'find_damage',
    'fitting_archs',
    'is_state',
    'load_pretrained',
    'read_checkpoint',
    'select_weights',
    'upgrade_hook',
    'upgrade_names',
    'write_checkpoint',
]
_OPTIONS = ('type', 'checkpoint', 'prefix', 'map_location')
# names of the first published checkpoints, and today's
_OLD_NAMES = (
    (re.compile(r'^patch_embed\.proj\.'), 'patch_embed.0.'),
    (re.compile(r'^patch_embed\.norm\.'), 'patch_embed.2.'),
    (re.compile(r'^(layers\.\d+\.blocks\.\d+\.)ln_1\.'), r'\1norm.'),
    (re.compile(r'^(layers\.\d+\.blocks\.\d+\.)self_attention\.'), r'\1op.'),
    (re.compile(r'^(norm|head)\.(?=weight$|bias$)'), r'classifier.\1.'),
)


def load_pretrained(model, init_cfg) -> None:
    """Load a checkpoint into a backbone; one log line says what was loaded and what was left out.

    Args:
        model (VSSMBackbone): The backbone.
        init_cfg (dict): ``type='Pretrained'`` and ``checkpoint``, a path or URL; optionally ``prefix``, where the
            backbone's keys begin in the file (found without it if that is ``backbone.`` or nothing), and
            ``map_location`` (default: ``cpu``).

    Raises:
        TypeError: If ``init_cfg`` has an unknown key, or one of a wrong type.
        ValueError: If ``init_cfg`` is of another type than ``Pretrained``.
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file can't be downloaded or read, or its weights don't fit.
    """
    options = _check_init_cfg(init_cfg)
    name = options['checkpoint']
    content = read_checkpoint(name, options.get('map_location', 'cpu'))
    state, source = select_weights(content, name)
    state, left_out = backbone_weights(state, name, options.get('prefix'))
    expected = model.state_dict()
    fresh = _match_outnorms(state, expected, left_out)
    unused = set(model.unused(state))
    _check_fit(state, expected, name, source, unused)
    left_out += [key for key in state if key in unused]
    state = {key: value for key, value in state.items() if key not in unused}
    model.load_state_dict({**state, **{key: expected[key] for key in fresh}}, strict=True)

    line = f'Loaded {len(state)} weights from {source} of {name}'
    if left_out:
        groups = Counter(key.split('.')[0] for key in left_out)
        line += '; left out: ' + ', '.join(f'{group} ({count})' for group, count in groups.items())
    if fresh:
        norms = sorted({key.split('.')[0] for key in fresh})
        line += f'; not in the file, kept as initialized: {", ".join(norms)}'
    print_log(line, logger='current')


def select_weights(content, name: str) -> tuple:
    """Find the state dict in a checkpoint.

    Args:
        content: What :func:`read_checkpoint` returned.
        name (str): Name of the checkpoint, for errors.

    Returns:
        tuple[dict, str]: The state dict and the name of its place in the file.

    Raises:
        CheckpointError: If no known layout is found.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f'checkpoint {name!r} holds a {type(content).__name__}, expected a dict')
    found = [key for key in ('model', 'model_ema', 'state_dict', 'ema_state_dict') if is_state(content.get(key))]
    if is_state(content):
        state, source = content, 'the state dict'
    elif not found:
        raise CheckpointError(
            f'checkpoint {name!r} holds {_some(content)}, expected model, model_ema or state_dict with tensors'
        )
    else:
        source = 'model_ema' if 'model_ema' in found and _ema_was_evaluated(content) else found[0]
        state = content[source]
    # DistributedDataParallel and averaged models add module., torch.compile adds _orig_mod.
    if any(key.startswith('module.') for key in state):
        state = {key[len('module.') :]: value for key, value in state.items() if key.startswith('module.')}
    state = {key.replace('_orig_mod.', ''): value for key, value in state.items()}
    return state, source


def is_state(value) -> bool:
    """Whether a value is a state dict: names and tensors."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, str) and isinstance(item, torch.Tensor) for key, item in value.items())
    )


def backbone_weights(state: dict, name: str, prefix=None) -> tuple:
    """Take the backbone out of a state dict, under today's names.

    Args:
        state (dict): State dict of a backbone or of a model with one.
        name (str): Name of the checkpoint, for errors.
        prefix (str, optional): Where the backbone's keys begin. Default: ``backbone.`` if there are such keys.

    Returns:
        tuple[dict, list]: The backbone's state dict (the norm of an official classifier becomes the ``outnorm`` of the
        last stage), and the keys left out.

    Raises:
        CheckpointError: If there is no backbone.
    """
    if prefix is None:
        prefix = 'backbone.' if any(key.startswith('backbone.') for key in state) else ''
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    weights = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    left_out = [key for key in state if not key.startswith(prefix)]
    upgrade_names(weights)
    stages = [int(key.split('.')[1]) for key in weights if re.match(r'layers\.\d{1,4}\.', key)]
    if not stages:
        hint = next((key for key in state if re.search(r'(^|\.)patch_embed\.', key)), None)
        advice = f'; try prefix={hint.split("patch_embed.")[0]!r}' if hint else ''
        raise CheckpointError(
            f'checkpoint {name!r} has no weights of a VMamba backbone under prefix {prefix!r}; it holds {_some(state)}'
            + advice
        )
    norm = f'outnorm{max(stages)}'
    for key in [key for key in weights if key.startswith('classifier.')]:
        value = weights.pop(key)
        leaf = key.removeprefix('classifier.norm.')
        if leaf != key and f'{norm}.{leaf}' not in weights:
            weights[f'{norm}.{leaf}'] = value
        else:
            left_out.append(key)
    return weights, left_out


def upgrade_names(state: dict, prefix: str = '') -> None:
    """Rename the keys of early official checkpoints in place, and give 1x1 convolutions the shape of linear layers.

    Args:
        state (dict): State dict.
        prefix (str): Where the backbone's keys begin; other keys are not touched. Default: none.
    """
    for key in [key for key in state if key.startswith(prefix)]:
        value = state.pop(key)
        if key.endswith('.weight') and value.dim() == 4 and value.shape[2:] == (1, 1):
            value = value.flatten(1)
        new = key[len(prefix) :]
        for pattern, name in _OLD_NAMES:
            new = pattern.sub(name, new)
        state[prefix + new] = value


def upgrade_hook(state_dict: dict, prefix: str, *_) -> None:
    """:func:`upgrade_names` as a pre-hook of ``load_state_dict``, for backbones inside whole official models."""
    upgrade_names(state_dict, prefix)


def fitting_archs(state: dict) -> list:
    """Find the archs of :data:`mmvmamba.models.ARCHS` whose weights have these names and shapes.

    Args:
        state (dict): State dict of a backbone; norms of output maps are not compared.

    Returns:
        list[str]: Names of archs.
    """
    from mmvmamba.models import ARCHS  # which imports this module

    shapes = _shapes(state)
    return [arch for arch in ARCHS if _shapes_of_arch(arch) == shapes]


def _shapes(state: dict) -> dict:
    return {key: value.shape for key, value in state.items() if not key.startswith('outnorm')}


@functools.cache
def _shapes_of_arch(arch: str) -> dict:
    from mmvmamba.models import VSSMBackbone

    with torch.device('meta'):
        return _shapes(VSSMBackbone(arch).state_dict())


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


def _ema_was_evaluated(content: dict) -> bool:
    """Whether an official file records an accuracy of its averaged weights, under either spelling."""
    accuracy = content.get('max_accuray_ema', content.get('max_accuracy_ema'))
    if isinstance(accuracy, torch.Tensor):
        accuracy = accuracy.item() if accuracy.numel() == 1 else None
    return isinstance(accuracy, (int, float)) and accuracy > 0


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


def _check_fit(state: dict, expected: dict, name: str, source: str, unused: set) -> None:
    expected = {key: value for key, value in expected.items() if key in state or not key.startswith('outnorm')}
    problems = []
    missing = [key for key in expected if key not in state]
    if missing:
        problems.append(f'{len(missing)} missing: {_some(missing)}')
    unexpected = [key for key in state if key not in expected and key not in unused]
    if unexpected:
        problems.append(f'{len(unexpected)} unexpected: {_some(unexpected)}')
    common = [key for key in expected if key in state]
    shapes = [
        f'{key} {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}'
        for key in common
        if state[key].shape != expected[key].shape
    ]
    if shapes:
        problems.append(f'{len(shapes)} of other shapes: {_some(shapes, "; ")}')
    kinds = [
        f'{key} {state[key].dtype} {state[key].layout}'
        for key in common
        if state[key].is_floating_point() != expected[key].is_floating_point() or state[key].layout != torch.strided
    ]
    if kinds:
        problems.append(f'{len(kinds)} of other kinds: {_some(kinds)}')
    if not problems:
        return
    archs = fitting_archs(state)
    fit = f'it fits arch {" or ".join(map(repr, archs))}' if archs else f'no known arch fits; it has {_describe(state)}'
    raise CheckpointError(
        f'checkpoint {name!r}: {source} does not fit this backbone, {fit}. Weights ' + '. '.join(problems)
    )


def _describe(state: dict) -> str:
    """Depths and widths of a backbone's state dict, as far as they can be told."""
    matches = (re.match(r'layers\.(\d{1,4})\.blocks\.(\d{1,4})\.', key) for key in state)
    blocks = {match.groups() for match in matches if match}
    depths = Counter(int(stage) for stage, _ in blocks)
    norms = [state.get(f'layers.{stage}.blocks.0.norm.weight') for stage in sorted(depths)]
    dims = tuple(None if norm is None else norm.shape[0] for norm in norms)
    return f'depths {tuple(depths[stage] for stage in sorted(depths))}, dims {dims}'


def _some(items, separator: str = ', ', limit: int = 4) -> str:
    """The first few items of a list, and how many more there are."""
    items = [str(item) for item in items]
    more = f'{separator}and {len(items) - limit} more' if len(items) > limit else ''
    return separator.join(items[:limit]) + more

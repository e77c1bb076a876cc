"""Where a checkpoint keeps its weights: official files, those of OpenMMLab, and bare state dicts of any of them."""

import re
from typing import Optional

import torch
from mmengine.logging import print_log

from .errors import CheckpointError

# where averaged weights are, which are preferred, and weights; mmengine's state_dict is the average if there is one
AVERAGED = ('model_ema', 'state_dict_ema', 'params_ema', 'ema', 'teacher')
PLACES = (
    'model',
    'state_dict',
    'model_state',
    'model_state_dict',
    'params',
    'module',
    'weights',
    'student',
    'ema_state_dict',
)

# names of the first published checkpoints, and today's
_OLD_NAMES = (
    (re.compile(r'^patch_embed\.proj\.'), 'patch_embed.0.'),
    (re.compile(r'^patch_embed\.norm\.'), 'patch_embed.2.'),
    (re.compile(r'^(layers\.\d+\.blocks\.\d+\.)ln_1\.'), r'\1norm.'),
    (re.compile(r'^(layers\.\d+\.blocks\.\d+\.)self_attention\.'), r'\1op.'),
    (re.compile(r'^(norm|head)\.(?=weight$|bias$)'), r'classifier.\1.'),
)


def select_weights(content, name: str, key: Optional[str] = None) -> tuple:
    """Find the state dict in a checkpoint.

    Args:
        content: What :func:`read_checkpoint` returned.
        name (str): Name of the checkpoint, for errors.
        key (str, optional): Its place in the file. Default: the first of ``AVERAGED`` and ``PLACES`` that is there; of
            ``model_ema`` in an official file only if that records its accuracy.

    Returns:
        tuple[dict, str]: The state dict, without what thop left in it, and the name of its place in the file.

    Raises:
        CheckpointError: If no known layout is found, or nothing is at ``key``.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f'checkpoint {name!r} holds a {type(content).__name__}, expected a dict')
    found = [place for place in (*AVERAGED, *PLACES) if is_state(content.get(place))]
    if 'model' in found and not _ema_was_evaluated(content):
        found = [place for place in found if place != 'model_ema']
    if key is not None:
        if not is_state(content.get(key)):
            places = [place for place, value in content.items() if is_state(value)]
            raise CheckpointError(
                f'checkpoint {name!r} has no weights under key {key!r}, expected '
                + (f'one of {", ".join(map(repr, places))}' if places else f'no key; it holds {shorten(content)}')
            )
        state, source = content[key], key
    elif is_state(content):
        state, source = content, 'the state dict'
    elif not found:
        others = [place for place, value in content.items() if is_state(value)]
        advice = f'; key={others[0]!r} in init_cfg names a place of weights' if others else ''
        raise CheckpointError(
            f'checkpoint {name!r} holds {shorten(content)}, expected weights under one of '
            f'{", ".join((*PLACES, *AVERAGED))}{advice}'
        )
    else:
        source = found[0]
        state = content[source]
    counts = [place for place in state if place.rpartition('.')[2] in ('total_ops', 'total_params')]
    if counts:
        state = {place: value for place, value in state.items() if place not in set(counts)}
        print_log(f'left out {len(counts)} counts that thop had put among the weights of {name}', logger='current')
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
        prefix (str, optional): Where the backbone's keys begin. Default: where ``patch_embed`` stands, if in one place;
            ``backbone.`` before others.

    Returns:
        tuple[dict, dict]: The backbone's state dict (the norm of an official classifier becomes the ``outnorm`` of the
        last stage), and the weights left out, those of an official classifier under today's names.

    Raises:
        CheckpointError: If there is no backbone.
    """
    if prefix is None:
        prefixes = sorted(
            {key[: match.start(1)] for key in state if (match := re.search(r'(?:^|\.)(patch_embed)\.', key))}
        )
        if any(key.startswith('backbone.') for key in state):
            prefix = 'backbone.'
        elif len(prefixes) > 1 and '' not in prefixes:
            raise CheckpointError(
                f'checkpoint {name!r} has a patch_embed under each of {shorten(map(repr, prefixes))}; expected one of '
                'them as prefix in init_cfg'
            )
        else:
            prefix = prefixes[0] if len(prefixes) == 1 else ''
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    weights = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    left_out = {key: value for key, value in state.items() if not key.startswith(prefix)}
    upgrade_names(weights)
    stages = [int(key.split('.')[1]) for key in weights if re.match(r'layers\.\d{1,4}\.', key)]
    if not stages:
        hint = next((key for key in state if re.search(r'(^|\.)patch_embed\.', key)), None)
        advice = f'; try prefix={hint.split("patch_embed.")[0]!r}' if hint else ''
        raise CheckpointError(
            f'checkpoint {name!r} has no weights of a VMamba backbone under prefix {prefix!r}; it holds '
            + shorten(state)
            + advice
        )
    norm = f'outnorm{max(stages)}'
    for key in [key for key in weights if key.startswith('classifier.')]:
        value = weights.pop(key)
        leaf = key.removeprefix('classifier.norm.')
        if leaf != key and f'{norm}.{leaf}' not in weights:
            weights[f'{norm}.{leaf}'] = value
        else:
            left_out[key] = value
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


def _ema_was_evaluated(content: dict) -> bool:
    """Whether an official file records an accuracy of its averaged weights, under either spelling."""
    accuracy = content.get('max_accuray_ema', content.get('max_accuracy_ema'))
    if isinstance(accuracy, torch.Tensor):
        accuracy = accuracy.item() if accuracy.numel() == 1 else None
    return isinstance(accuracy, (int, float)) and accuracy > 0


def shorten(items, separator: str = ', ', limit: int = 4) -> str:
    """The first few items of a list, and how many more there are."""
    items = [str(item) for item in items]
    more = f'{separator}and {len(items) - limit} more' if len(items) > limit else ''
    return separator.join(items[:limit]) + more

"""Where a checkpoint keeps its weights: official files, those of OpenMMLab, and bare state dicts of any of them."""

import re

import torch

from .errors import CheckpointError

# names of the first published checkpoints, and today's
_OLD_NAMES = (
    (re.compile(r'^patch_embed\.proj\.'), 'patch_embed.0.'),
    (re.compile(r'^patch_embed\.norm\.'), 'patch_embed.2.'),
    (re.compile(r'^(layers\.\d+\.blocks\.\d+\.)ln_1\.'), r'\1norm.'),
    (re.compile(r'^(layers\.\d+\.blocks\.\d+\.)self_attention\.'), r'\1op.'),
    (re.compile(r'^(norm|head)\.(?=weight$|bias$)'), r'classifier.\1.'),
)


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
            f'checkpoint {name!r} holds {shorten(content)}, expected model, model_ema or state_dict with tensors'
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

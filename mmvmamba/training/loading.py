"""Weights that mmengine loads into a model with a VMamba: in all layouts and as strictly as ``init_cfg`` does.

mmengine's ``load_checkpoint`` (``load_from``, ``mim test``, inferencers) knows one layout and skips what does not fit:
a model with random weights runs.  For a model with a :class:`VSSMBackbone` the weights are brought into its names, the
backbone must get all of its own, and a line tells what else stays as initialized.
"""

import contextlib
import functools
import logging
import pickle
import re
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import CheckpointLoader, checkpoint
from mmengine.runner.checkpoint import load_from_local as load_from_local_of_mmengine
from torch import nn

from mmvmamba.checkpoint import CheckpointError, is_state, read_checkpoint, select_weights
from mmvmamba.checkpoint.layouts import AVERAGED, shorten

_HEADS = {'classifier.head.': 'head.fc.'}  # of a published classifier: that of mmpretrain's LinearClsHead
_OF_VMAMBA = re.compile(r'(^|\.)layers\.\d+\.blocks\.\d+\.(op|self_attention)\.')
_whole = False


def setup_loading() -> None:
    """Let mmengine load by the rules of :mod:`mmvmamba.checkpoint`; a second call changes nothing."""
    CheckpointLoader.register_scheme(('http://', 'https://', 'hf://'), load_from_http, force=True)
    checkpoint.load_from_http = load_from_http  # other schemes look a URL up and call this one
    CheckpointLoader.register_scheme('', load_from_local, force=True)
    theirs = checkpoint.load_state_dict
    if not hasattr(theirs, 'of_mmengine'):
        checkpoint.load_state_dict = functools.update_wrapper(functools.partial(load_state_dict, theirs), theirs)
        checkpoint.load_state_dict.of_mmengine = theirs


def load_from_http(filename: str, map_location=None):
    """:func:`mmvmamba.checkpoint.read_checkpoint` for mmengine, which names a loader in the log by its name."""
    return _prefer_average(read_checkpoint(filename, map_location), filename)


def load_from_local(filename: str, map_location=None):
    """mmengine's own loader of files; what it cannot read is read, or refused by name, by ours."""
    if str(filename).endswith('.safetensors'):
        return read_checkpoint(str(filename), map_location)
    try:
        return _prefer_average(load_from_local_of_mmengine(filename, map_location), filename)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        return read_checkpoint(str(filename), map_location)


def _prefer_average(content, name: str):
    """Of a VMamba's file with averaged weights beside ``state_dict``, make those the ones that mmengine takes."""
    beside = isinstance(content, dict) and any(is_state(content.get(place)) for place in AVERAGED)
    if beside and any(_OF_VMAMBA.search(key) for key in content.get('state_dict', ())):
        content = {**content, 'state_dict': select_weights(content, name)[0]}
    return content


@contextlib.contextmanager
def whole_models():
    """While it lasts, a model with a VMamba must get every weight, its head's too."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before


def load_state_dict(theirs, module: nn.Module, state_dict: dict, strict: bool = False, logger=None):
    """mmengine's function of that name, ``theirs``, with weights that :func:`fit_model` went through."""
    return theirs(module, fit_model(module, state_dict), strict, logger)


def fit_model(module: nn.Module, content: dict, name: str = 'weights') -> dict:
    """Bring weights into the names of a model.

    Args:
        module (nn.Module): Any model; one without a VMamba takes its weights as they are.
        content (dict): A state dict, or a file's content.
        name (str): What to call it in errors.

    Returns:
        dict: The state dict.

    Raises:
        CheckpointError: If the backbone would not get all of its weights; within :func:`whole_models` also if another
            part of the model would not.
    """
    inner: Any = module
    while is_model_wrapper(inner) or isinstance(inner, BaseTTAModel):
        inner = inner.module
    module = inner
    places = [(place, child) for place, child in module.named_modules() if hasattr(child, 'fit_weights')]
    if len(places) != 1 or not all(isinstance(key, str) for key in content):
        return content
    place, backbone = places[0]
    prefix, expected = f'{place}.' if place else '', module.state_dict()
    if all(key in content and getattr(content[key], 'shape', None) == expected[key].shape for key in expected):
        return content  # such as a checkpoint of this very model
    source, _ = select_weights(content, name)
    own = prefix if prefix and any(key.startswith(prefix) for key in source) else None
    fitted = backbone.fit_weights(content, name, dict(prefix=own))
    state = {prefix + key: value for key, value in fitted.state.items()}
    for key, value in fitted.others.items():
        for theirs, ours in _HEADS.items():
            key = ours + key[len(theirs) :] if key.startswith(theirs) else key
        state.setdefault(key, value)
    left = [key for key in expected if key not in state or state[key].shape != expected[key].shape]
    left += [prefix + key for key in fitted.fresh if prefix + key not in left]
    if left:
        line = f'{len(left)} weights of the model are not in {name}: {shorten(left)}'
        if _whole:
            raise CheckpointError(f'{line}; expected a checkpoint of the whole {type(module).__name__}')
        print_log(f'{line}; they stay as initialized', logger='current', level=logging.WARNING)
    return state

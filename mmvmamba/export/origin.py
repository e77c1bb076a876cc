"""What an exported file says of its origin: which part of a model it holds, and which weights it was made of."""

import hashlib
from typing import Any

import torch
from torch import nn

PART, WEIGHTS = 'part', 'weights'  # names in a file's metadata
BACKBONE, WITH_NECK, MODEL = 'backbone', 'backbone and neck', 'model'
_DIGITS = 8  # hexadecimal, of a weight's hash


def describe(model: Any, scope: str, part: str = 'auto') -> dict:
    """Texts for the metadata of an exported file.

    Args:
        model (nn.Module): The model that is exported, with a ``backbone``.
        scope (str): mmpretrain, mmdet or mmseg.
        part (str): As in :func:`mmvmamba.export.graphs.as_graph`.

    Returns:
        dict[str, str]: ``part``, and ``weights``: hashes of the backbone's.
    """
    whole = dict(mmdet=WITH_NECK if model.with_neck else BACKBONE).get(scope, MODEL)
    return {PART: BACKBONE if part == 'backbone' else whole, WEIGHTS: ' '.join(sorted(_hashes(model.backbone)))}


def missing_weights(known: str, weights: dict) -> tuple:
    """How many of a file's weights are not in a state dict, and how many the file has.

    Args:
        known (str): ``weights`` of the file's metadata.
        weights (dict): State dict. Names don't matter, nor do weights that the file makes no use of.

    Returns:
        tuple[int, int]: The two numbers.
    """
    wanted = set(known.split())
    return len(wanted - _hash_values(weights.values())), len(wanted)


def _hashes(module: nn.Module) -> set:
    return _hash_values(module.state_dict().values())


def _hash_values(values) -> set:
    return {_hash(value) for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()}


def _hash(value: torch.Tensor) -> str:
    """Of the numbers in float32, which a file of half precision keeps as well."""
    data = value.detach().to('cpu', torch.float32).flatten().contiguous().view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:_DIGITS]

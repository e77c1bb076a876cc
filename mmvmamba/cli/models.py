"""Configs and models as command lines name them."""

from importlib import import_module
from pathlib import Path
from typing import Optional

import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmvmamba.checkpoint import read_checkpoint, select_weights
from mmvmamba.models import VSSMBackbone

from .errors import UserError, first_line

CODEBASES = ('mmpretrain', 'mmdet', 'mmseg')
NO_CHECKPOINT = 'none'


def read_config(config: str) -> Config:
    """Read a config by path, or by ``scope::name`` from an installed codebase.

    Raises:
        UserError: If there is none, or it is not one of a model of the three codebases.
    """
    if '::' in config:
        try:
            cfg = get_config(config)
        except Exception as error:  # a missing package, file or metafile each raise their own
            raise UserError(f'config {config!r} is not in an installed codebase: {first_line(error)}') from error
    elif not Path(config).is_file():
        raise UserError(f'config {config!r} is not a file; expected a path, or SCOPE::NAME')
    else:
        try:
            cfg = Config.fromfile(config)
        except Exception as error:  # a config is a program: it may raise anything
            raise UserError(f'config {config!r} cannot be read: {first_line(error)}') from error
    scope = cfg.get('default_scope')
    if scope not in CODEBASES or 'model' not in cfg:
        raise UserError(
            f'config {config!r} has default_scope {scope!r} and {"a" if "model" in cfg else "no"} model; expected a '
            f'model and one of {", ".join(CODEBASES)}'
        )
    return cfg


def require_codebase(scope: str) -> None:
    """Import a codebase's models, as building one does; there mmengine would go on and say that it knows no such model.

    Raises:
        UserError: If the codebase, mmcv or mmcv's ops can't be imported.
    """
    try:
        import_module(f'{scope}.models')
    except Exception as error:  # a refused version is an AssertionError, a broken library an OSError
        raise UserError(
            f'{scope} cannot be imported: {first_line(error)}; "python -m mmvmamba.doctor" says what to do'
        ) from error


def load_model(config: str, checkpoint: Optional[str], device='cpu', seed: int = 0) -> nn.Module:
    """Build the model of a config with the weights of a checkpoint, in eval mode.

    Args:
        config (str): See :func:`read_config`.
        checkpoint (str, optional): Path or URL; ``none`` or None for initial weights.
        device (str | torch.device): Where to put it. Default: cpu.
        seed (int): Seed of initial weights. Default: 0.

    Returns:
        nn.Module: The classifier, detector or segmentor, with ``backbone`` and ``data_preprocessor``.

    Raises:
        UserError: If the config can't be read, its codebase can't be imported, or the weights don't fit.
        CheckpointError: If the checkpoint is missing, can't be read, or is of another arch.
    """
    cfg = read_config(config)
    require_codebase(cfg.default_scope)
    init_default_scope(cfg.default_scope)
    _forget_pretrained(cfg.model)
    torch.manual_seed(seed)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if checkpoint in (None, NO_CHECKPOINT):
        logger = MMLogger.get_current_instance()
        level = logger.level
        logger.setLevel('WARNING')  # three lines a weight otherwise
        model.init_weights()
        logger.setLevel(level)
    else:
        _load_weights(model, checkpoint)
    return model.to(device).eval()


def require_vmamba(model: nn.Module, config: str) -> VSSMBackbone:
    """The model's backbone, which must be a VMamba."""
    if not isinstance(model.backbone, VSSMBackbone):
        raise UserError(f'config {config!r} has the backbone {type(model.backbone).__name__}, expected a VSSMBackbone')
    return model.backbone


def _forget_pretrained(cfg) -> None:
    """Remove what would load other weights first: ``init_cfg`` of type Pretrained, and ``pretrained``."""
    if isinstance(cfg, dict):
        init_cfg = cfg.get('init_cfg')
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            cfg['init_cfg'] = None
        if cfg.get('pretrained'):
            cfg['pretrained'] = None
    if isinstance(cfg, (dict, list, tuple)):
        for value in cfg.values() if isinstance(cfg, dict) else cfg:
            _forget_pretrained(value)


def _load_weights(model: nn.Module, name: str) -> None:
    state, source = select_weights(read_checkpoint(name), name)
    expected = model.state_dict()
    problems = {
        'missing': [key for key in expected if key not in state],
        'unexpected': [key for key in state if key not in expected],
        'of another shape': [key for key in expected if key in state and state[key].shape != expected[key].shape],
    }
    if any(problems.values()):
        if isinstance(model.backbone, VSSMBackbone):
            model.backbone.load_pretrained(dict(type='Pretrained', checkpoint=name))  # names the arch that would fit
        found = ', '.join(f'{len(keys)} {kind} ({keys[0]}, ...)' for kind, keys in problems.items() if keys)
        raise UserError(
            f'checkpoint {name!r}: {source} does not fit the {type(model).__name__} of the config, weights {found}; '
            'expected a checkpoint that this config trained'
        )
    model.load_state_dict(state, strict=True)

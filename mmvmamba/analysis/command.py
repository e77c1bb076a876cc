"""Models, images, output folders and errors as the command lines of the analysis and export tools know them."""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Optional

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmvmamba.checkpoint import CheckpointError, load_pretrained, read_checkpoint, select_weights
from mmvmamba.launch import CODEBASES
from mmvmamba.models import VSSMBackbone

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp')
NO_CHECKPOINT = 'none'
MAX_SIDE = 8192  # pixels: a typing error must not ask for terabytes


class ToolError(Exception):
    """A command line that can't be run; the message names the argument, what was found and what was expected."""


def run_tool(tool) -> int:
    """Run a tool; an error of the user's is one line and exit code 2, not lost among the libraries' warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            tool()
    except (ToolError, CheckpointError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


# ---- arguments ------------------------------------------------------------------------------------------------------
def add_output_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--out-dir``, ``--force`` and ``--device``."""
    parser.add_argument(
        '--out-dir', type=Path, default=Path(default), help='where the results go (default: %(default)s)'
    )
    parser.add_argument('--force', action='store_true', help='replace the results that --out-dir holds')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='default: a GPU if there is one'
    )


def add_models_argument(parser: argparse.ArgumentParser, checkpoint: bool = True) -> None:
    """Add ``--model NAME CONFIG CHECKPOINT``, which may be given several times."""
    names = ('NAME', 'CONFIG', 'CHECKPOINT') if checkpoint else ('NAME', 'CONFIG')
    text = 'a model under the name it has in the results; CONFIG is a path or SCOPE::NAME, such as mmpretrain::...'
    if checkpoint:
        text += f'; CHECKPOINT is a path, a URL or {NO_CHECKPOINT!r}'
    parser.add_argument(
        '--model',
        dest='models',
        action='append',
        nargs=len(names),
        metavar=names,
        required=True,
        help=text + '; repeat it to compare models',
    )


def check_names(models: list) -> None:
    """Check that every ``--model`` has a name of its own."""
    names = [model[0] for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ToolError(f'--model has the name {name!r} {names.count(name)} times, expected a different one each')


def parse_size(values, option: str = '--size') -> Optional[tuple]:
    """One or two numbers to (height, width), or None for None.

    Raises:
        ToolError: If there are more, or one is below 32 or above ``MAX_SIDE``.
    """
    if values is None:
        return None
    if len(values) > 2 or min(values) < 32 or max(values) > MAX_SIDE:
        raise ToolError(
            f'{option} is {" ".join(map(str, values))}, expected one or two numbers from 32 to {MAX_SIDE}: H [W]'
        )
    return values[0], values[-1]


def check_device(device: str) -> torch.device:
    """Check that torch can use a device.

    Raises:
        ToolError: If it can't.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ToolError(f'--device is {device!r}, which torch can not use here: {_first_line(error)}') from error
    return torch.device(device)


def check_out_dir(out_dir: Path, force: bool) -> None:
    """Check before any work that nothing would be overwritten; :func:`make_out_dir` makes the folder after it.

    Raises:
        ToolError: If the folder has content and ``force`` is not set, the path is a file, or can't be written.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise ToolError(f'--out-dir is {str(out_dir)!r}, a file; expected a folder or a path that is free')
    if out_dir.is_dir() and any(out_dir.iterdir()) and not force:
        raise ToolError(f'--out-dir {str(out_dir)!r} has content; expected an empty or new folder, or --force')
    check_writable(out_dir, '--out-dir')


def check_writable(path: Path, option: str) -> None:
    """Check that a folder, or the first one above it that exists, can be written.

    Raises:
        ToolError: If it can't, or is no folder.
    """
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        state = 'can not be written' if folder.is_dir() else 'is not a folder'
        raise ToolError(f'{option} is {str(path)!r}, but {str(folder)!r} {state}')


def make_out_dir(out_dir: Path) -> Path:
    """Make the output folder.

    Raises:
        ToolError: If it can't be made.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(f'{str(out_dir)!r} can not be made: {error.strerror}') from error
    return out_dir


# ---- models ---------------------------------------------------------------------------------------------------------
def read_config(config: str) -> Config:
    """Read a config by path, or by ``scope::name`` from an installed codebase.

    Raises:
        ToolError: If there is none, or it is not one of a model of the three codebases.
    """
    if '::' in config:
        try:
            cfg = get_config(config)
        except Exception as error:  # a missing package, file or metafile each raise their own
            raise ToolError(f'config {config!r} is not in an installed codebase: {_first_line(error)}') from error
    elif not Path(config).is_file():
        raise ToolError(f'config {config!r} is not a file; expected a path, or SCOPE::NAME')
    else:
        try:
            cfg = Config.fromfile(config)
        except Exception as error:  # a config is a program: it may raise anything
            raise ToolError(f'config {config!r} can not be read: {_first_line(error)}') from error
    scope = cfg.get('default_scope')
    if scope not in CODEBASES or 'model' not in cfg:
        raise ToolError(
            f'config {config!r} has default_scope {scope!r} and {"a" if "model" in cfg else "no"} model; expected a '
            f'model and one of {", ".join(CODEBASES)}'
        )
    return cfg


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
        ToolError: If there is no such file, or the weights don't fit.
        CheckpointError: If the checkpoint can't be read, or is of another arch.
    """
    cfg = read_config(config)
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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def require_vmamba(model: nn.Module, config: str) -> VSSMBackbone:
    """The model's backbone, which must be a VMamba."""
    if not isinstance(model.backbone, VSSMBackbone):
        raise ToolError(f'config {config!r} has the backbone {type(model.backbone).__name__}, expected a VSSMBackbone')
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
    try:
        state, source = select_weights(read_checkpoint(name), name)
    except FileNotFoundError as error:
        raise ToolError(f'{error}; expected a path, a URL or {NO_CHECKPOINT!r}') from error
    expected = model.state_dict()
    problems = {
        'missing': [key for key in expected if key not in state],
        'unexpected': [key for key in state if key not in expected],
        'of another shape': [key for key in expected if key in state and state[key].shape != expected[key].shape],
    }
    if any(problems.values()):
        if isinstance(model.backbone, VSSMBackbone):
            load_pretrained(model.backbone, dict(type='Pretrained', checkpoint=name))  # names the arch that would fit
        found = ', '.join(f'{len(keys)} {kind} ({keys[0]}, ...)' for kind, keys in problems.items() if keys)
        raise ToolError(
            f'checkpoint {name!r}: {source} does not fit the {type(model).__name__} of the config, weights {found}; '
            'expected a checkpoint that this config trained'
        )
    model.load_state_dict(state, strict=True)


# ---- images ---------------------------------------------------------------------------------------------------------
def list_images(path: str, option: str, limit: Optional[int] = None) -> list:
    """The images of a folder and its subfolders, evenly thinned to ``limit``, or the one image that a path names.

    Raises:
        ToolError: If there is none.
    """
    folder = Path(path)
    if folder.is_file():
        return [folder]
    images = sorted(file for file in folder.rglob('*') if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        state = 'holds no image' if folder.is_dir() else 'does not exist'
        raise ToolError(f'{option} {path!r} {state}; expected an image or a folder with {", ".join(IMAGE_SUFFIXES)}')
    if limit is not None and len(images) > limit:
        images = [images[i * len(images) // limit] for i in range(limit)]
    return images


def read_image(path, option: str, size: Optional[tuple] = None) -> np.ndarray:
    """Read an image, resized to (height, width) if ``size`` is given; uint8 (H, W, 3) in the order BGR.

    Raises:
        ToolError: If it can't be read.
    """
    image = mmcv.imread(str(path)) if Path(path).is_file() else None
    if image is None:
        state = 'is not an image that OpenCV reads' if Path(path).exists() else 'does not exist'
        raise ToolError(f'{option} {str(path)!r} {"is a folder" if Path(path).is_dir() else state}')
    return image if size is None else mmcv.imresize(image, size[::-1])


def normalize(model: nn.Module, image: np.ndarray) -> torch.Tensor:
    """A BGR image as the model's input (1, 3, H, W): by the mean, std and channel order of its preprocessor."""
    mean, std, to_rgb = preprocessing(model)
    device = next(model.parameters()).device
    channels = torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1] if to_rgb else image))
    x = channels.permute(2, 0, 1).float()
    return ((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None].to(device)


def preprocessing(model: nn.Module) -> tuple:
    """Mean and std of each channel, and whether images are turned to RGB, as the model's preprocessor does it."""
    preprocessor = model.data_preprocessor
    mean, std = (getattr(preprocessor, name, None) for name in ('mean', 'std'))
    names = ('to_rgb', 'channel_conversion', '_channel_conversion')  # mmpretrain's, mmseg's and mmengine's
    to_rgb = any(getattr(preprocessor, name, False) for name in names)
    if mean is None:
        return [0.0] * 3, [1.0] * 3, to_rgb
    return mean.flatten().tolist(), std.flatten().tolist(), to_rgb


def pyplot():
    """matplotlib.pyplot without a display."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    return plt

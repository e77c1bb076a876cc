"""Images as command lines name them, as models take them, and pictures of results."""

from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import nn

from .errors import UserError

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp')


def list_images(path: str, option: str, limit: Optional[int] = None) -> list:
    """The images of a folder and its subfolders, evenly thinned to ``limit``, or the one image that a path names.

    Raises:
        UserError: If there is none.
    """
    folder = Path(path)
    if folder.is_file():
        return [folder]
    images = sorted(file for file in folder.rglob('*') if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        state = 'holds no image' if folder.is_dir() else 'does not exist'
        raise UserError(f'{option} {path!r} {state}; expected an image or a folder with {", ".join(IMAGE_SUFFIXES)}')
    if limit is not None and len(images) > limit:
        images = [images[i * len(images) // limit] for i in range(limit)]
    return images


def read_image(path, option: str, size: Optional[tuple] = None) -> np.ndarray:
    """Read an image, resized to (height, width) if ``size`` is given; uint8 (H, W, 3) in the order BGR.

    Raises:
        UserError: If it can't be read.
    """
    import mmcv  # which the package itself does without

    image = mmcv.imread(str(path)) if Path(path).is_file() else None
    if image is None:
        state = 'is not an image that OpenCV reads' if Path(path).exists() else 'does not exist'
        raise UserError(f'{option} {str(path)!r} {"is a folder" if Path(path).is_dir() else state}')
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
    preprocessor: Any = model.data_preprocessor
    mean, std = getattr(preprocessor, 'mean', None), getattr(preprocessor, 'std', None)
    names = ('to_rgb', 'channel_conversion', '_channel_conversion')  # mmpretrain's, mmseg's and mmengine's
    to_rgb = any(getattr(preprocessor, name, False) for name in names)
    if mean is None or std is None:
        return [0.0] * 3, [1.0] * 3, to_rgb
    return mean.flatten().tolist(), std.flatten().tolist(), to_rgb


def pyplot():
    """matplotlib.pyplot without a display."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    return plt

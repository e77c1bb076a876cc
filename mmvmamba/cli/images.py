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


def list_samples(data: str, option: str, limit: Optional[int] = None) -> tuple:
    """The images of a folder with a subfolder a class, evenly thinned to ``limit`` a class.

    Returns:
        tuple[list, list]: Pairs of path and place of the class, and the names of the classes in order.

    Raises:
        UserError: If there is no class, or one without an image.
    """
    if not Path(data).is_dir():
        raise UserError(f'{option} {data!r} is not a folder; expected one with a subfolder a class')
    classes = sorted(path.name for path in Path(data).iterdir() if path.is_dir())
    if not classes:
        raise UserError(f'{option} {data!r} has no subfolder; expected one a class')
    folders = (str(Path(data) / name) for name in classes)
    samples = [(path, i) for i, folder in enumerate(folders) for path in list_images(folder, option, limit)]
    return samples, classes


def resize_and_crop(image: np.ndarray, size: int, crop_ratio: float) -> np.ndarray:
    """Resize the shorter side to size / crop_ratio, bicubically, and take the middle, (size, size, C)."""
    import mmcv

    scale = round(size / crop_ratio) / min(image.shape[:2])
    height, width = (max(size, round(side * scale)) for side in image.shape[:2])
    image = mmcv.imresize(image, (width, height), interpolation='bicubic').reshape(height, width, -1)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def read_image(path, option: str, size: Optional[tuple] = None, channels: int = 3) -> np.ndarray:
    """Read an image, resized to (height, width) if ``size`` is given.

    Args:
        path (str | Path): A file.
        option (str): What to call it in errors.
        size (tuple[int, int], optional): Height and width. Default: its own.
        channels (int): 1 turns colours into grey, 3 grey into colours; any other number must be that of the file.

    Returns:
        np.ndarray: (H, W, channels) of the file's type, colours in the order BGR.

    Raises:
        UserError: If it can't be read, or has another number of channels.
    """
    import mmcv  # which the package itself does without

    kinds = {1: 'grayscale', 3: 'color'}
    image = mmcv.imread(str(path), flag=kinds.get(channels, 'unchanged')) if Path(path).is_file() else None
    if image is None:
        state = 'is not an image that OpenCV reads' if Path(path).exists() else 'does not exist'
        raise UserError(f'{option} {str(path)!r} {"is a folder" if Path(path).is_dir() else state}')
    if size is not None:
        image = mmcv.imresize(image, size[::-1])
    image = image.reshape(*image.shape[:2], -1)
    if image.shape[2] != channels:
        raise UserError(f'{option} {str(path)!r} has {image.shape[2]} channels, expected {channels} for this model')
    return image


def image_channels(model: nn.Module) -> int:
    """Channels of a model's images: what its backbone says, or its first convolution."""
    given = getattr(getattr(model, 'backbone', model), 'in_channels', None)
    if isinstance(given, int):
        return given
    return next((layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)), 3)


def as_rgb(image: np.ndarray) -> np.ndarray:
    """An image of :func:`read_image` as one to show, (H, W, 3) in the order RGB; of more channels the first three."""
    return np.ascontiguousarray(image[:, :, 2::-1] if image.shape[2] > 2 else image[:, :, :1].repeat(3, 2))


def normalize(model: nn.Module, image: np.ndarray) -> torch.Tensor:
    """An image as the model's input (1, C, H, W): by the mean, std and channel order of its preprocessor."""
    mean, std, to_rgb = preprocessing(model)
    device = next(model.parameters()).device
    if len(mean) not in (1, image.shape[2]):
        raise UserError(
            f'the data_preprocessor has the mean of {len(mean)} channels, expected {image.shape[2]}, those of the image'
        )
    channels = torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1] if to_rgb and image.shape[2] == 3 else image))
    x = channels.permute(2, 0, 1).float()
    return ((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None].to(device)


def preprocessing(model: nn.Module) -> tuple:
    """Mean and std of each channel, and whether images are turned to RGB, as the model's preprocessor does it."""
    preprocessor: Any = model.data_preprocessor
    mean, std = getattr(preprocessor, 'mean', None), getattr(preprocessor, 'std', None)
    names = ('to_rgb', 'channel_conversion', '_channel_conversion')  # mmpretrain's, mmseg's and mmengine's
    to_rgb = any(getattr(preprocessor, name, False) for name in names)
    if mean is None or std is None:
        channels = image_channels(model)
        return [0.0] * channels, [1.0] * channels, to_rgb
    return mean.flatten().tolist(), std.flatten().tolist(), to_rgb


def pyplot():
    """matplotlib.pyplot without a display."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    return plt

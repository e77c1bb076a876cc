"""Running a package of :func:`mmvmamba.export.to_package` from Python."""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from .package import IMAGES, LEAST, MOST, op_library
from .program import AXES


class Package:
    """A loaded package: a function of images that checks them, since the machine code itself does not.

    Args:
        path (str | Path): The package.
        device_index (int): Which GPU, for a package for CUDA. Default: the current one.
        run_single_threaded (bool): Leave out the locks of concurrent calls, as CUDA graphs need it. Default: False.

    Attributes:
        metadata (dict): The texts in the package.
        sizes (dict): Least and most of batch, channels, height and width; None for no bound.
        python_ops (list): Ops whose kernels are in Python, so that a C++ program cannot run the package.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no package of :func:`mmvmamba.export.to_package`, or is for another release of torch.
        RuntimeError: If the compiled ops, or the GPU that it is for, are not there.
    """

    def __init__(self, path, device_index: int = -1, run_single_threaded: bool = False):
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f'package {str(path)!r} is not a file')
        op_library()
        facts = _read_facts(path)
        if facts['device'] == 'cuda' and not torch.cuda.is_available():
            raise RuntimeError(f'package {str(path)!r} is for CUDA, and torch sees no GPU')
        from torch._inductor import aoti_load_package

        self._run: Any = aoti_load_package(
            str(path), run_single_threaded=run_single_threaded, device_index=device_index
        )
        own = (IMAGES, LEAST, MOST)
        texts = self._run.get_metadata().items()
        self.metadata = {key: text for key, text in texts if key not in own and not key.startswith('AOTI_')}
        self.python_ops = facts['python_ops']
        self.sizes = {axis: tuple(facts['sizes'][axis]) for axis in AXES}
        self.device = torch.device(facts['device'])
        if self.device.type == 'cuda':
            self.device = torch.device('cuda', device_index if device_index >= 0 else torch.cuda.current_device())
        self.dtype = getattr(torch, facts['dtype'])

    def __call__(self, images: torch.Tensor) -> Any:
        """What the module gives for images (B, C, H, W); a tensor or a tuple of them.

        Raises:
            TypeError: If ``images`` is no tensor of four dimensions, or of another dtype.
            ValueError: If a size or the device is none that the package takes.
        """
        if not isinstance(images, torch.Tensor) or images.dim() != 4 or images.dtype != self.dtype:
            found = (images.dtype, tuple(images.shape)) if isinstance(images, torch.Tensor) else type(images).__name__
            raise TypeError(f'images is {found}, expected {self.dtype}, (B, C, H, W)')
        if images.device != self.device:
            raise ValueError(f'images is on {images.device}, expected {self.device}')
        for axis, size in zip(AXES, images.shape):
            least, most = self.sizes[axis]
            if size < least or (most is not None and size > most):
                expected = f'{least}' if least == most else f'{least} or more' + (f', up to {most}' if most else '')
                raise ValueError(f'images has {axis} {size}, expected {expected}: the package takes no other')
        with torch.no_grad():
            return self._run(images.contiguous())


def _read_facts(path: Path) -> dict:
    """What a package says of its images, read before its machine code is loaded, which another torch may refuse."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith('_metadata.json')]
            facts = json.loads(json.loads(archive.read(names[0]))[IMAGES])
    except (zipfile.BadZipFile, IndexError, KeyError, ValueError) as error:
        raise ValueError(f'{str(path)!r} is no package of mmvmamba.export.to_package') from error
    if _release(facts['torch']) != _release(torch.__version__):
        raise ValueError(
            f'package {str(path)!r} was compiled for torch {facts["torch"]} and this is {torch.__version__}; '
            'compile it again with this torch'
        )
    return facts


def _release(version: str) -> list:
    return version.split('+')[0].split('.')[:2]

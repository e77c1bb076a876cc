"""Checkpoint files, read without running any code in them, and written whole."""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Union
from uuid import uuid4

import torch
from mmengine.fileio import get

from .download import fetch_checkpoint
from .errors import CheckpointError, MissingCheckpointError
from .whole import PART, commit, remove, sha256

CLEAN = (
    'If the weights are all you want: python tools/model_converters/clean_checkpoint.py {} clean.pth copies them and '
    'runs nothing'
)
_FOLDER = 0x10  # in the attributes of a zip file's records


class _CfgNode:
    """Stand-in for the configuration object in official files: becomes a plain dict, so that yacs is not needed."""

    def __new__(cls):
        return OrderedDict()


_CfgNode.__module__, _CfgNode.__qualname__, _CfgNode.__name__ = 'yacs.config', 'CfgNode', 'CfgNode'
torch.serialization.add_safe_globals([_CfgNode])


def read_checkpoint(checkpoint: str, map_location='cpu'):
    """Read a checkpoint without running any code in it.

    Args:
        checkpoint (str): A path; an http(s) URL, downloaded once into torch.hub's folder; ``hf://OWNER/NAME/FILE``, in
            which ``@REVISION`` may follow NAME, for huggingface_hub; or a URI of mmengine's storage backends.  A name
            that ends in ``.safetensors`` is of that format.
        map_location: As in :func:`torch.load`. Default: ``cpu``.

    Returns:
        The content, a dict for every known layout.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it can't be downloaded or read.
    """
    scheme = checkpoint.partition('://')[0].lower() if '://' in checkpoint else ''
    advice = ''
    file: Union[str, BytesIO]
    if scheme in ('http', 'https'):
        file = fetch_checkpoint(checkpoint)
        advice = f'; delete {file} to download it again'
    elif scheme == 'hf':
        file = _fetch_from_hub(checkpoint)
    elif scheme:
        try:
            file = BytesIO(get(checkpoint))
        except Exception as error:  # each storage backend has its own
            raise CheckpointError(f'checkpoint {checkpoint!r} cannot be fetched ({error})') from error
    else:
        file = checkpoint
        if not os.path.isfile(file):
            raise MissingCheckpointError(f'checkpoint {checkpoint!r} is not a file')
    if checkpoint.endswith('.safetensors'):
        return _read_safetensors(file, checkpoint, map_location)
    damage = find_damage(file) if _begins_as_zip(file) else ''
    if damage:
        raise CheckpointError(f'checkpoint {checkpoint!r} is damaged, {damage}{advice}')
    try:
        if isinstance(file, BytesIO):
            file.seek(0)
        return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r'GLOBAL (\S+)', str(error)) or re.search(
            r'reduce for unrecognized function (.+)', str(error)
        )
        if unsafe:
            raise CheckpointError(
                f'checkpoint {checkpoint!r} was not loaded: besides weights it holds {unsafe[1]}, which could run '
                f'code; expected tensors, numbers and text only. {CLEAN.format(checkpoint)}'
            ) from error
        raise CheckpointError(f'checkpoint {checkpoint!r} is not a file of torch.save{advice}') from error
    except Exception as error:
        # the readers raise many types; each means that the file is damaged, and none may pass
        reason = str(error).strip().split('\n')[0] or type(error).__name__
        raise CheckpointError(
            f'checkpoint {checkpoint!r} cannot be read, it is truncated or no checkpoint ({reason}){advice}'
        ) from error


def _read_safetensors(file: Union[str, BytesIO], name: str, map_location) -> dict:
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise CheckpointError(f'checkpoint {name!r} needs safetensors: pip install safetensors') from error
    try:
        content = load(file.getvalue() if isinstance(file, BytesIO) else Path(file).read_bytes())
    except Exception as error:  # its own, and those of a damaged header
        raise CheckpointError(
            f'checkpoint {name!r} cannot be read, it is no whole file of safetensors ({error})'
        ) from error
    return {key: value.to(map_location) for key, value in content.items()} if map_location is not None else content


def _fetch_from_hub(name: str) -> str:
    """Path of what ``hf://OWNER/NAME[@REVISION]/FILE`` names, in the cache of huggingface_hub."""
    match = re.fullmatch(r'hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)', name)
    if match is None:
        raise CheckpointError(f'checkpoint {name!r} is no file on the hub, expected hf://OWNER/NAME/FILE')
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise CheckpointError(f'checkpoint {name!r} needs huggingface_hub: pip install huggingface_hub') from error
    try:
        return hf_hub_download(match[1], match[3], revision=match[2])
    except Exception as error:  # each kind of failure has its own
        raise CheckpointError(f'checkpoint {name!r} cannot be fetched ({error})') from error


def write_checkpoint(content, path, name_by_hash: bool = False) -> Path:
    """Save a checkpoint; a file of that name is replaced when the new one is whole, and stays if that fails.

    Args:
        content: What to save.
        path (str | Path): The file; folders are made.
        name_by_hash (bool): Whether to put the start of the SHA-256 at the end of the name. Default: ``False``.

    Returns:
        Path: The file.

    Raises:
        CheckpointError: If it can't be written.
    """
    path = Path(path)
    part = f'{path}.{uuid4().hex}{PART}'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, 'wb') as file:  # a name would become part of the content
            torch.save(content, file)
        if name_by_hash:
            path = path.with_name(f'{path.stem}-{sha256(part)[:8]}.pth')
        commit(part, str(path))
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        reason = getattr(error, 'strerror', None) or str(error).split('\n')[0]
        raise CheckpointError(f'{path} cannot be written ({reason})') from error
    finally:
        remove(part)
    return path


def find_damage(file) -> str:
    """Check the checksum of every record in a file of ``torch.save``; torch does not check it when it loads.

    Args:
        file (str | BytesIO): The file; those of torch < 1.6 have no checksums and count as damaged.

    Returns:
        str: What is wrong, empty if nothing is.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            record = archive.testzip()
            folders = [item.filename for item in archive.infolist() if item.is_dir() or item.external_attr & _FOLDER]
    except Exception as error:  # zipfile raises many types; each means that the file is not whole
        return f'it is truncated or no checkpoint: {str(error).strip() or type(error).__name__}'
    if folders:  # torch's reader would skip them and take what its memory held before for the weights
        return f'{folders[0]} is marked as a folder'
    return f'{record} does not have the checksum that it was saved with' if record else ''


def _begins_as_zip(file) -> bool:
    """Whether torch takes a file for one with checksums, by its first bytes; other readers look at its end."""
    if isinstance(file, BytesIO):
        return file.getvalue()[:4] == b'PK\x03\x04'
    with open(file, 'rb') as stream:
        return stream.read(4) == b'PK\x03\x04'

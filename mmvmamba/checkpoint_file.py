"""Checkpoint files: fetched once, held to their checksums, and read without running any code in them."""

import hashlib
import os
import pickle
import posixpath
import re
import shutil
import zipfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import HTTPRedirectHandler, Request, build_opener
from uuid import uuid4

import torch
from mmengine.dist import barrier, get_rank
from mmengine.fileio import get

from mmvmamba.hooks.files import PART, commit, remove

# OpenMMLab and torch.hub put the start of the SHA-256 at the end of a file name
_HASH = re.compile(r'-([a-f0-9]{8,})\.')
_FOLDER = 0x10  # in the attributes of a zip file's records
_LOCAL_HOSTS = ('localhost', '127.0.0.1', '::1')


class CheckpointError(RuntimeError):
    """A checkpoint can't be read, or doesn't fit the model."""


class _CfgNode:
    """Stand-in for the configuration object in official files: becomes a plain dict, so that yacs is not needed."""

    def __new__(cls):
        return OrderedDict()


_CfgNode.__module__, _CfgNode.__qualname__, _CfgNode.__name__ = 'yacs.config', 'CfgNode', 'CfgNode'
torch.serialization.add_safe_globals([_CfgNode])


def read_checkpoint(checkpoint: str, map_location='cpu'):
    """Read a checkpoint without running any code in it.

    Args:
        checkpoint (str): A path; an http(s) URL, downloaded once into torch.hub's folder; or a URI of mmengine's
            storage backends.
        map_location: As in :func:`torch.load`. Default: ``cpu``.

    Returns:
        The content, a dict for every known layout.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it can't be downloaded or read.
    """
    scheme = checkpoint.partition('://')[0].lower() if '://' in checkpoint else ''
    advice = ''
    if scheme in ('http', 'https'):
        file = fetch_checkpoint(checkpoint)
        advice = f'; delete {file} to download it again'
    elif scheme:
        try:
            file = BytesIO(get(checkpoint))
        except Exception as error:  # each storage backend has its own
            raise CheckpointError(f'checkpoint {checkpoint!r} can not be fetched ({error})') from error
    else:
        file = checkpoint
        if not os.path.isfile(file):
            raise FileNotFoundError(f'checkpoint {checkpoint!r} is not a file')
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
                'code; expected tensors, numbers and text only'
            ) from error
        raise CheckpointError(f'checkpoint {checkpoint!r} is not a file of torch.save{advice}') from error
    except Exception as error:
        # the readers raise many types; each means that the file is damaged, and none may pass
        reason = str(error).strip().split('\n')[0] or type(error).__name__
        raise CheckpointError(
            f'checkpoint {checkpoint!r} can not be read, it is truncated or no checkpoint ({reason}){advice}'
        ) from error


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
            path = path.with_name(f'{path.stem}-{_sha256(part)[:8]}.pth')
        commit(part, str(path))
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        reason = getattr(error, 'strerror', None) or str(error).split('\n')[0]
        raise CheckpointError(f'{path} can not be written ({reason})') from error
    finally:
        remove(part)
    return path


def find_damage(file) -> str:
    """Hold every record in a file of ``torch.save`` to its checksum, which torch itself does not when it loads.

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


def fetch_checkpoint(url: str) -> str:
    """Download a checkpoint once, over https and held to the hash in its name; rank 0 goes first, as in mmengine.

    The file lies in torch.hub's folder: under its name if that holds a hash, which is compared in every call; else in a
    folder of its own, so that files of one name from different places are kept apart.

    Args:
        url (str): An https URL of a file; http is for this machine only.

    Returns:
        str: Path of the file.

    Raises:
        CheckpointError: If the URL is not such a one, the file can't be downloaded, or doesn't have its hash.
    """
    name = _check_url(url)
    digest = _HASH.search(name)
    place = [] if digest else [hashlib.sha256(url.encode()).hexdigest()[:16]]
    path = os.path.join(torch.hub.get_dir(), 'checkpoints', *place, name)

    def fetch():
        if not os.path.exists(path):
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                _download(url, path, digest and digest[1])
            except Exception as error:
                raise CheckpointError(
                    f'checkpoint {url!r} can not be downloaded ({error}); check the network, or download it by other '
                    f'means to {path}'
                ) from error
        elif digest and not _sha256(path).startswith(digest[1]):
            raise CheckpointError(
                f'checkpoint {url!r} was downloaded to {path}, whose SHA-256 does not begin with {digest[1]}, as its '
                'name says; delete the file to download it again'
            )

    try:
        if get_rank() == 0:
            fetch()
    finally:
        barrier()
    fetch()
    return path


def _check_url(url: str) -> str:
    """The file name in a URL that may be downloaded from."""
    try:
        parts = urlparse(url)
        host, name = parts.hostname, posixpath.basename(parts.path)
    except ValueError as error:
        raise CheckpointError(f'checkpoint {url!r} is no URL ({error}); expected https://HOST/FILE') from error
    if not host or name in ('', '.', '..'):
        raise CheckpointError(
            f'checkpoint {url!r} has no {"file name" if host else "host"}; expected https://HOST/FILE'
        )
    if parts.scheme != 'https' and not (parts.scheme == 'http' and host in _LOCAL_HOSTS):
        raise CheckpointError(f'checkpoint {url!r} is not downloaded over an open connection; expected https://')
    return name


class _SafeRedirects(HTTPRedirectHandler):
    """A download that begins over https ends so."""

    def redirect_request(self, request, response, code, message, headers, url):
        if request.type == 'https' and urlparse(url).scheme != 'https':
            raise OSError(f'redirected to {url}, an open connection')
        _check_url(url)
        return super().redirect_request(request, response, code, message, headers, url)


def _download(url: str, path: str, digest) -> None:
    """Download a file under another name, which no other process has, and rename it when it is whole."""
    part = f'{path}.{uuid4().hex}{PART}'
    request = Request(url, headers={'User-Agent': 'mmvmamba'})
    try:
        with build_opener(_SafeRedirects).open(request, timeout=60) as source, open(part, 'wb') as target:
            shutil.copyfileobj(source, target, 2**20)
            length = source.headers.get('Content-Length')
        if length is not None and os.path.getsize(part) != int(length):
            raise OSError(f'the connection ended after {os.path.getsize(part)} of {length} bytes')
        found = _sha256(part)
        if digest and not found.startswith(digest):
            raise OSError(f'its hash begins with {found[:8]}, expected {digest}')
        commit(part, path)
    finally:
        remove(part)


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for chunk in iter(lambda: file.read(2**20), b''):
            digest.update(chunk)
    return digest.hexdigest()

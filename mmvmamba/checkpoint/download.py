"""Checkpoints by URL: fetched once, over https, and checked against the hash in their name."""

import hashlib
import os
import posixpath
import re
import shutil
from urllib.parse import urlparse
from urllib.request import HTTPRedirectHandler, Request, build_opener
from uuid import uuid4

import torch
from mmengine.dist import barrier, get_rank

from .errors import CheckpointError
from .whole import PART, commit, remove, sha256

# OpenMMLab and torch.hub put the start of the SHA-256 at the end of a file name
_HASH = re.compile(r'-([a-f0-9]{8,})\.')
_LOCAL_HOSTS = ('localhost', '127.0.0.1', '::1')


def fetch_checkpoint(url: str) -> str:
    """Download a checkpoint once, over https, and check the hash in its name; rank 0 goes first, as in mmengine.

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
                    f'checkpoint {url!r} cannot be downloaded ({error}); check the network, or download it by other '
                    f'means to {path}'
                ) from error
        elif digest and not sha256(path).startswith(digest[1]):
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
        raise CheckpointError(f'checkpoint {url!r} is not a URL ({error}); expected https://HOST/FILE') from error
    if not host or name in ('', '.', '..'):
        raise CheckpointError(
            f'checkpoint {url!r} has no {"file name" if host else "host"}; expected https://HOST/FILE'
        )
    if parts.scheme != 'https' and not (parts.scheme == 'http' and host in _LOCAL_HOSTS):
        raise CheckpointError(f'refusing to download checkpoint {url!r} over plain {parts.scheme}; use https')
    return name


class _SafeRedirects(HTTPRedirectHandler):
    """Redirects of a download over https must stay on https."""

    def redirect_request(self, request, response, code, message, headers, url):
        if request.type == 'https' and urlparse(url).scheme != 'https':
            raise OSError(f'redirected to {url}, which is not https')
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
        found = sha256(part)
        if digest and not found.startswith(digest):
            raise OSError(f'its hash begins with {found[:8]}, expected {digest}')
        commit(part, path)
    finally:
        remove(part)

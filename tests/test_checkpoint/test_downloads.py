"""Checkpoints from URLs: fetched once, whole, and held to the hash in the name; servers are this machine's own."""

import hashlib
import io
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from mmvmamba.checkpoint import CheckpointError, read_checkpoint
from tests.test_checkpoint.test_checkpoint import assert_loaded, build_through_init, official_weights, save


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An HTTP server of a folder, and an empty download folder; yields (address, folder)."""
    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f'http://127.0.0.1:{httpd.server_port}', folder
    httpd.shutdown()
    httpd.server_close()


def test_download_once(server, tmp_path):
    address, folder = server
    save({'model': official_weights()}, folder / 'small.pth')
    init_cfg = dict(type='Pretrained', checkpoint=f'{address}/small.pth')
    assert_loaded(build_through_init(init_cfg), official_weights())
    (folder / 'small.pth').unlink()
    assert_loaded(build_through_init(init_cfg), official_weights())
    assert len(list((tmp_path / 'hub/checkpoints').glob('*/small.pth'))) == 1


def test_files_of_one_name_are_kept_apart(server):
    address, folder = server
    for name, value in (('a', 1), ('b', 2)):
        (folder / name).mkdir()
        torch.save({'value': value}, folder / name / 'best.pth')
    assert [read_checkpoint(f'{address}/{name}/best.pth')['value'] for name in 'abab'] == [1, 2, 1, 2]


def test_hash_of_a_downloaded_file_is_compared_again(server, tmp_path):
    address, folder = server
    torch.save({'value': 1}, folder / 'small.pth')
    digest = hashlib.sha256((folder / 'small.pth').read_bytes()).hexdigest()[:8]
    (folder / 'small.pth').rename(folder / f'small-{digest}.pth')
    url = f'{address}/small-{digest}.pth'
    assert read_checkpoint(url) == read_checkpoint(url) == {'value': 1}
    (cached,) = (tmp_path / 'hub/checkpoints').iterdir()
    torch.save({'value': 2}, cached)
    with pytest.raises(CheckpointError, match=rf'{re.escape(str(cached))}.*SHA-256.*delete'):
        read_checkpoint(url)
    assert cached.is_file()


def test_processes_that_download_at_once(server, tmp_path):
    """Before they have a group, none waits for another; each finds a whole file."""
    address, folder = server
    torch.save({'value': torch.arange(300_000)}, folder / 'small.pth')
    with ThreadPoolExecutor(6) as pool:
        contents = list(pool.map(read_checkpoint, [f'{address}/small.pth'] * 6))
    assert all(torch.equal(content['value'], torch.arange(300_000)) for content in contents)
    assert [path.name for path in (tmp_path / 'hub').rglob('*') if path.is_file()] == ['small.pth']


def test_connection_that_ends_early(server, tmp_path, monkeypatch):
    address, folder = server
    torch.save({'value': 1}, folder / 'small.pth')
    copy = shutil.copyfileobj
    monkeypatch.setattr(shutil, 'copyfileobj', lambda source, target, *_: copy(io.BytesIO(source.read(9)), target))
    with pytest.raises(CheckpointError, match=r'ended after 9 of \d+ bytes'):
        read_checkpoint(f'{address}/small.pth')
    assert not [path for path in (tmp_path / 'hub').rglob('*') if path.is_file()]


def test_failed_download(server, tmp_path):
    with pytest.raises(CheckpointError, match=r'cannot be downloaded.*404'):
        build_through_init(dict(type='Pretrained', checkpoint=f'{server[0]}/none.pth'))
    assert not [path for path in (tmp_path / 'hub').rglob('*') if path.is_file()]


def test_wrong_hash_of_a_download(server, tmp_path):
    address, folder = server
    save({'model': official_weights()}, folder / 'small-0123abcd.pth')
    with pytest.raises(CheckpointError, match=r'cannot be downloaded.*hash'):
        build_through_init(dict(type='Pretrained', checkpoint=f'{address}/small-0123abcd.pth'))
    assert not list((tmp_path / 'hub/checkpoints').iterdir())


def test_damaged_download_says_which_file_to_delete(server):
    address, folder = server
    (folder / 'small.pth').write_bytes(b'PK\x03\x04 cut')
    with pytest.raises(CheckpointError, match=r'delete .*hub/checkpoints/.*/small.pth'):
        build_through_init(dict(type='Pretrained', checkpoint=f'{address}/small.pth'))

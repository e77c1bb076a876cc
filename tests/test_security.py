"""What the sources must not hold, where downloads may come from, and files that would run code."""

import ast
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request

import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader
from torch.torch_version import TorchVersion

from mmvmamba.checkpoint import CheckpointError, read_checkpoint
from mmvmamba.checkpoint import download as downloading
from mmvmamba.cli.launch import download
from mmvmamba.training.runtime import setup_runtime
from tests.test_tools.conftest import ROOT
from tests.test_training.toy import Writes

SOURCES = sorted(
    path
    for folder in ('mmvmamba', 'ops', 'tools', 'configs', '.')
    for path in (ROOT / folder).glob('*.py' if folder == '.' else '**/*.py')
    if '.mim' not in path.parts
)
FORBIDDEN = re.compile(
    r'^(eval|exec|compile|__import__|(c?[pP]ickle|dill|joblib|marshal)\.(load|loads|Unpickler)'
    r'|os\.(system|popen)|subprocess\.(getoutput|getstatusoutput)|yaml\.(load|unsafe_load)|torch\.hub\.load)$'
)
LOADERS = {
    'read_checkpoint': read_checkpoint,
    'mmengine': CheckpointLoader.load_checkpoint,
    'the tools': download,
}


def calls(path):
    """(line, dotted name, keyword arguments) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            keywords = {word.arg: getattr(word.value, 'value', None) for word in node.keywords}
            yield node.lineno, ast.unparse(node.func), keywords


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_runs_no_foreign_code(path):
    for line, name, keywords in calls(path):
        place = f'{path.relative_to(ROOT)}:{line}: {name}'
        assert not FORBIDDEN.match(name), place
        assert not keywords.get('shell'), f'{place} builds a shell command'
        assert not keywords.get('allow_pickle'), place
        if name == 'torch.load':
            assert keywords.get('weights_only') is True, f'{place} without weights_only=True'
    for url in re.findall(r'http://[^\s\'")\]]+', path.read_text()):
        assert re.match(r'http://(localhost|127\.0\.0\.1|www\.apache\.org|www\.w3\.org/2000/svg|\{)', url), url


def test_the_search_finds_what_it_looks_for(tmp_path):
    path = tmp_path / 'bad.py'
    path.write_text('eval("1")\npickle.load(f)\nsubprocess.run(c, shell=True)\ntorch.load(p)\nos.system(c)\n')
    found = list(calls(path))
    assert [bool(FORBIDDEN.match(name)) for _, name, _ in found] == [True, True, False, False, True]
    assert found[2][2] == {'shell': True} and found[3][2] == {}


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty download folder, and a test that fails when something is downloaded."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(downloading, '_download', lambda *_: pytest.fail('downloaded'))


@pytest.mark.parametrize(
    'url', ['http://example.com/a.pth', 'http://10.0.0.1/a-12345678.pth', 'HTTP://EXAMPLE.COM/a.pth']
)
@pytest.mark.parametrize('load', LOADERS)
def test_downloads_over_open_connections_are_refused(load, url, no_network):
    errors, words = CheckpointError, r'refusing to download .* over plain http; use https'
    if load == 'mmengine' and url.startswith('HTTP'):
        errors, words = FileNotFoundError, re.escape(url)  # to mmengine, a path
    with pytest.raises(errors, match=words):
        LOADERS[load](url)


@pytest.mark.parametrize(
    'url', ['https://[', 'https://', 'https:///a.pth', 'https://example.com', 'https://example.com/', 'https://a/..']
)
def test_urls_that_name_no_file(url, no_network):
    with pytest.raises(CheckpointError, match=rf'{re.escape(repr(url))}.* expected https://HOST/FILE'):
        read_checkpoint(url)


@pytest.mark.parametrize('target', ['http://example.com/a.pth', 'http://localhost/a.pth', 'ftp://a/b', 'file:///a'])
def test_redirects_do_not_leave_https(target):
    request = Request('https://example.com/a.pth')
    with pytest.raises(OSError, match='which is not https'):
        downloading._SafeRedirects().redirect_request(request, None, 302, 'Found', {}, target)
    further = downloading._SafeRedirects().redirect_request(request, None, 302, 'Found', {}, 'https://b/a.pth')
    assert further.full_url == 'https://b/a.pth'


def test_redirects_of_a_server_are_followed_by_the_rules(monkeypatch, tmp_path):
    """From this machine elsewhere, too."""

    class Redirects(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header('Location', 'http://example.com/a.pth')
            self.end_headers()

        def log_message(self, *_):
            pass

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with ThreadingHTTPServer(('127.0.0.1', 0), Redirects) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(CheckpointError, match=r'http://example\.com/a\.pth.*over plain http'):
            read_checkpoint(f'http://127.0.0.1:{server.server_port}/a.pth')
        server.shutdown()


def test_the_hash_is_that_of_the_file_name(monkeypatch, tmp_path):
    """A folder may look like a hash too."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'run-deadbeef01.d'))
    asked = []

    def download(url, path, digest):
        asked.append(digest)
        torch.save({}, path)

    monkeypatch.setattr(downloading, '_download', download)
    monkeypatch.setattr(downloading, 'sha256', lambda path: '0123abcd' + 56 * '0')
    read_checkpoint('https://example.com/plain.pth')
    read_checkpoint('https://example.com/named-0123abcd.pth')
    assert asked == [None, '0123abcd']


@pytest.mark.parametrize('scheme', ['s3', 'nothing', 'file'])
def test_other_schemes(scheme):
    with pytest.raises(CheckpointError, match=rf'{scheme}://a/b.pth'):
        read_checkpoint(f'{scheme}://a/b.pth')


@pytest.fixture
def evil(tmp_path):
    """A checkpoint that would write a file, and that file."""
    path, trace = tmp_path / 'evil.pth', tmp_path / 'trace'
    torch.save({'state_dict': {}, 'meta': Writes(trace)}, path)
    return path, trace


@pytest.mark.parametrize('prefix', ['https://example.com/', 'torchvision://', 'openmmlab://', 'mmcls://'])
def test_what_mmengine_downloads_is_loaded_safely(prefix, evil, monkeypatch):
    """torch.hub, which mmengine has for this, would run code in it in any version of torch."""
    path, trace = evil
    monkeypatch.setattr(downloading, '_download', lambda url, target, digest: shutil.copy(path, target))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(path.parent))
    for models in ('get_torchvision_models', 'get_external_models', 'get_mmcls_models'):
        monkeypatch.setattr(f'mmengine.runner.checkpoint.{models}', lambda: {'evil.pth': 'https://example.com/e.pth'})
    with pytest.raises(CheckpointError, match='could run code'):
        CheckpointLoader.load_checkpoint(f'{prefix}evil.pth', map_location='cpu')
    assert not trace.exists()


def test_older_torch_is_told_to_load_safely(monkeypatch):
    """Before 2.6 that is not its default."""
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '')  # so that it is as before when the test ends
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD')
    setup_runtime()
    assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ or torch.__version__ < (2, 6)
    monkeypatch.setattr(torch, '__version__', TorchVersion('2.5.1+cpu'))
    setup_runtime()
    assert os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] == '1'
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')  # the user's word stands
    setup_runtime()
    assert os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] == '0'


def test_mmengine_loads_safely_too(evil):
    """``mim test`` and ``--resume`` load by mmengine, with whatever torch takes for the default."""
    path, trace = evil
    with pytest.raises(Exception, match=r'could run code'):
        CheckpointLoader.load_checkpoint(str(path), map_location='cpu')
    assert not trace.exists()


def test_only_data_classes_are_allowed_in_checkpoints():
    """The allow-list is global in torch: what mmvmamba adds to it must not be able to do anything."""
    listing = """import torch
for item in torch.serialization.get_safe_globals():
    print(item[1] if isinstance(item, tuple) else f'{item.__module__}.{item.__qualname__}')
"""
    own, mended = (
        set(subprocess.run([sys.executable, '-c', text], capture_output=True, text=True, check=True).stdout.split())
        for text in (listing, 'import mmvmamba\n' + listing)
    )
    # the function under getattr's name is mmvmamba's, for four methods of HistoryBuffer
    harmless = (
        r'(numpy|torch)\..*|mmengine\.logging\.history_buffer\.HistoryBuffer|builtins\.getattr|yacs\.config\.CfgNode'
        r'|_codecs\.encode'
    )
    added = mended - own
    assert added and not [name for name in added if not re.fullmatch(harmless, name)]


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh'])
def test_scripts_pass_on_what_the_user_gives_as_it_is(script, tmp_path):
    """Words that a shell would run reach the program as words."""
    for name in ('python', 'srun'):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    words = ['$(touch trace)', 'a b', '; touch trace', '`touch trace`', "'", '*']
    fixed = ['part', words[0]] if 'slurm' in script else []
    arguments = [*fixed, words[1], *(['check; touch trace'] if 'test' in script else []), *words[2:]]
    if 'dist' in script:
        arguments.insert(2 if 'test' in script else 1, '2')
    environment = {'PATH': f'{tmp_path}:/usr/bin:/bin', 'PYTHON': str(tmp_path / 'python')}
    command = ['bash', str(ROOT / 'tools' / script), *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / 'trace').exists()
    assert result.stdout.splitlines()[-4:] == words[2:]


HASHED = ('build.txt', 'torch.txt', 'gpu.txt', 'tested.txt', 'mmcv-lite.txt', 'dev.txt')


def test_tested_set_is_pinned():
    for name in HASHED + ('compiled.txt', 'mmcv.txt'):
        lines = (ROOT / 'requirements' / name).read_text().splitlines()
        packages = [line for line in lines if line.strip() and not line.startswith(('#', '-', ' '))]
        assert packages and all(re.match(r'^[A-Za-z0-9_.\-]+==[\w.+]+', line) for line in packages), name


def test_hashes_are_those_of_the_tested_set():
    lines = [line for line in (ROOT / 'requirements/hashes.txt').read_text().splitlines() if not line.startswith('#')]
    matches = [re.fullmatch(r'(\S+==\S+) --hash=sha256:([0-9a-f]{64})', line) for line in lines]
    assert all(matches) and len({match[2] for match in matches}) == len(lines)
    pins = set()
    for name in HASHED:
        pins |= {line for line in (ROOT / 'requirements' / name).read_text().splitlines() if re.match(r'\w', line)}
    assert {match[1] for match in matches} == pins

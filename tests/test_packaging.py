"""Installing with and without nvcc, a compiler or torch: each is green and says what it built and why."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

from mmvmamba.export.openvino import build
from tests.test_tools.conftest import STANDARD

ROOT = Path(__file__).parents[1]
NVCC = shutil.which('nvcc')
USE = (
    'import torch; from mmvmamba.ops import backend_report, selective_scan as scan\n'
    'x = torch.randn(1, 4, 9); b = torch.randn(1, 2, 1, 9)\n'
    'y = scan(x, x, -torch.ones(4, 1), b, b)\n'
    'print([s.name for s in backend_report() if s.available], backend_report()[1].reason)\n'
)


@pytest.fixture
def tree(tmp_path):
    """A copy of the package's sources, so that building leaves nothing in the checkout."""
    tree = tmp_path / 'tree'
    tree.mkdir()
    ignore = shutil.ignore_patterns('*.so', '__pycache__', '.mim', '_build_info.json', 'data')
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'NOTICE', 'model-index.yml'):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for name in ('mmvmamba', 'ops', 'configs', 'tools'):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    return tree


def install(tree, **environment):
    """pip install into a folder of its own; returns that folder, the build information and pip's words."""
    target = tree.parent / 'site'
    command = [sys.executable, '-m', 'pip', 'install', '-v', '--no-deps', '--no-build-isolation', '--no-index']
    result = subprocess.run(
        [*command, '--target', str(target), '.'],
        cwd=tree,
        env={**os.environ, 'MAX_JOBS': '2', **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    info = json.loads((target / 'mmvmamba/ops/_build_info.json').read_text())
    return target, info, result.stdout + result.stderr


def use(target):
    """What a process says that uses the installed package."""
    environment = {**os.environ, 'PYTHONPATH': str(target)}
    result = subprocess.run([sys.executable, '-c', USE], cwd=target, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_a_compiler(tree):
    target, info, words = install(tree, CXX='no-such-compiler')
    assert info['built'] == 'none' and not list(target.glob('mmvmamba/ops/_C*'))
    assert "no C++ compiler: 'no-such-compiler' is not on PATH" in info['reason'] and info['reason'] in words
    said = use(target)
    assert 'naive' in said and "'cpu'" not in said.split(']')[0] and 'no C++ compiler' in said
    files = {path.name for path in (target / 'mmvmamba/.mim').iterdir()}
    assert files == {'configs', 'tools', 'model-index.yml'}
    data = {str(path.relative_to(target)) for name in ('py.typed', 'schema.inc') for path in target.rglob(name)}
    assert {'mmvmamba/py.typed', 'mmvmamba/ops/py.typed', 'mmvmamba/ops/ss2d/schema.inc'} <= data
    # of the C++ sources only those of the library for OpenVINO, which users build
    sources = {path for suffix in ('.cpp', '.h', '.cu', '.cuh') for path in target.rglob(f'*{suffix}')}
    built = {*build.SOURCES, *build.HEADERS}
    assert {path.name for path in sources} == {path.name for path in built}


def test_without_torch_at_build_time(tree):
    """As in an isolated build."""
    (tree.parent / 'fake').mkdir()
    (tree.parent / 'fake/torch.py').write_text("raise ImportError('there is no torch here')\n")
    target, info, _ = install(tree, PYTHONPATH=str(tree.parent / 'fake'))
    assert info['built'] == 'none' and 'there is no torch here' in info['reason']
    assert '--no-build-isolation' in info['reason'] and 'naive' in use(target)


def test_a_failed_build_went_through_ccache_and_leaves_a_working_install(tree, monkeypatch):
    ccache, log = tree.parent / 'bin/ccache', tree.parent / 'compiled'
    ccache.parent.mkdir()
    ccache.write_text(f'#!/bin/sh\ncase "$1" in -*) exit 0;; esac\necho "$@" >> {log}\nexec "$@"\n')
    ccache.chmod(0o755)
    monkeypatch.delenv('CXX', raising=False)
    shutil.rmtree(tree / 'ops/csrc')
    (tree / 'ops/csrc').mkdir()
    (tree / 'ops/csrc/registration.cpp').write_text('#error "does not compile"\n')
    folders = f'{ccache.parent}{os.pathsep}{os.environ["PATH"]}'
    target, info, _ = install(tree, MMVMAMBA_BUILD='cpu', PATH=folders)
    assert any(line.startswith('c++ ') and 'registration.cpp' in line for line in log.read_text().splitlines())
    assert info['built'] == 'none' and info['reason'].startswith('compilation failed') and 'naive' in use(target)
    assert 'run pip with -v' in info['reason'] and info['arches'] == []


def test_unknown_build_is_refused(tree):
    command = [sys.executable, 'setup.py', '-q', 'build_ext']
    environment = {**os.environ, 'MMVMAMBA_BUILD': 'gpu'}
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert result.returncode != 0 and "MMVMAMBA_BUILD is 'gpu', expected cpu, cuda or none" in result.stderr


@pytest.fixture
def script(monkeypatch):
    """What setup.py defines."""
    monkeypatch.setattr(setuptools, 'setup', lambda **_: None)
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '')
    return SimpleNamespace(**runpy.run_path(str(ROOT / 'setup.py')))


def toolkit(folder, listed, supported):
    """An nvcc that lists some architectures, and the helpers of a torch that supports some."""

    def flags():
        arches = os.environ['TORCH_CUDA_ARCH_LIST'].split(';')
        if not {arch.replace('+PTX', '') for arch in arches} <= set(supported.split()):
            raise ValueError(f'Unknown CUDA arch ({arches}) or GPU not supported')
        return arches

    nvcc = folder / 'nvcc'
    nvcc.write_text('#!/bin/sh\n' + ''.join(f'echo compute_{number}\n' for number in listed.split()))
    nvcc.chmod(0o755)
    return str(nvcc), SimpleNamespace(_get_cuda_arch_flags=flags)


@pytest.mark.parametrize(
    'listed, supported, expected',
    [
        (
            '75 80 86 87 88 89 90 100 110 103 120 121',
            '7.5 8.0 8.6 8.7 8.9 9.0 9.0a 10.0 10.3 11.0 12.0 12.1',
            '8.0;8.6;8.9;9.0;10.0;10.3;11.0;12.0;12.1+PTX',
        ),
        ('80 86 87 89 90 100 101 120', '8.0 8.6 8.9 9.0 9.0a', '8.0;8.6;8.9;9.0+PTX'),
        ('52 80 86', '5.2 8.0 8.6 8.9 9.0', '8.0;8.6+PTX'),
    ],
)
def test_default_arches_are_what_both_nvcc_and_torch_know(listed, supported, expected, script, tmp_path):
    assert script.cuda_arches(*toolkit(tmp_path, listed, supported)) == expected


@pytest.mark.parametrize(
    'visible, expected',
    [(('9.0',), '9.0'), (('8.0', '9.0'), '8.0;9.0'), (('12.1',), '8.0;8.6;9.0+PTX'), ((), '8.0;8.6;9.0+PTX')],
)
def test_the_visible_gpu_alone_is_compiled_for_if_nvcc_and_torch_know_it(visible, expected, script, tmp_path):
    assert script.cuda_arches(*toolkit(tmp_path, '80 86 90', '8.0 8.6 9.0 12.1'), visible) == expected


def test_without_a_gpu_the_cuda_part_is_built_where_it_is_asked_for(script, monkeypatch):
    helpers = SimpleNamespace(CUDA_HOME='/no/such')
    monkeypatch.setitem(script.choose_build.__globals__, 'find_nvcc', lambda _: 'nvcc')
    torch_there = SimpleNamespace(
        version=SimpleNamespace(cuda='13.0'), cuda=SimpleNamespace(is_available=lambda: False)
    )
    monkeypatch.delenv('MMVMAMBA_BUILD', raising=False)
    monkeypatch.setenv('CXX', sys.executable)
    kind, reason = script.choose_build(torch_there, helpers)
    assert kind == 'cpu' and 'no GPU is visible' in reason and "TORCH_CUDA_ARCH_LIST='9.0' pip install" in reason
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '9.0')
    assert script.choose_build(torch_there, helpers)[0] == 'cuda'
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '')
    monkeypatch.setenv('MMVMAMBA_BUILD', 'cuda')
    assert script.choose_build(torch_there, helpers)[0] == 'cuda' and script.visible_arches() == ()


def test_a_wheel_is_named_after_what_it_is_built_for(script, monkeypatch):
    release = '.'.join(torch.__version__.split('.')[:2])
    for kind, tag in (('cpu', 'cpu'), ('cuda', 'cu130')):
        monkeypatch.setitem(script.wheel_tag.__globals__, 'choose_build', lambda *_, kind=kind: (kind, ''))
        monkeypatch.setattr(torch.version, 'cuda', '13.0')
        assert script.wheel_tag() == f'+torch{release}{tag}'
    monkeypatch.setitem(script.wheel_tag.__globals__, 'choose_build', lambda *_: ('none', 'no C++ compiler'))
    with pytest.raises(SystemExit, match=r'a wheel needs the extension: no C\+\+ compiler'):
        script.wheel_tag()


def test_the_library_that_users_build_has_the_flags_of_the_others(script):
    assert set(build.FLAGS) == {*script.FLAGS, '-std=c++17'}


def test_the_files_of_a_name_are_compiled_as_one(script, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for kind in ('cpu', 'cuda'):
        sources = script.find_sources(kind)
        united = script.unite(sources, tmp_path / kind)
        texts = [Path(path).read_text() for path in united if path.startswith(str(tmp_path))]
        included = [f'ops/csrc/{name}' for text in texts for name in re.findall(r'#include "(.*)"', text)]
        assert sorted([*included, *(path for path in united if path in sources)]) == sources
        assert {Path(path).name for path in included} >= {'autograd.cpp', 'cpu.cpp'}


def test_no_arch_in_common_is_an_error_and_the_variable_goes_first(script, tmp_path, monkeypatch):
    tools = toolkit(tmp_path, '50 52', '9.0')
    with pytest.raises(RuntimeError, match=r'none of the GPU architectures 8\.0, .* in common'):
        script.cuda_arches(*tools)
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', 'Hopper')
    assert script.cuda_arches(*tools) == 'Hopper'


@pytest.mark.parametrize(
    'listed, expected',
    [('8.0;9.0+PTX', ['8.0', '9.0+PTX']), ('Hopper', ['9.0+PTX']), ('9.0a 8.6', ['8.6', '9.0a'])],
)
def test_built_arches_are_read_from_the_flags_of_torch(listed, expected, script):
    assert script.built_arches(script.arch_flags(listed, cpp_extension)) == expected


def cuda_flags():
    """Flags of the CUDA build that decide whether a file compiles, with as little optimisation as there is."""
    folders = [*cpp_extension.include_paths(), sysconfig.get_path('include'), str(ROOT / 'ops/csrc')]
    packaged = Path(cpp_extension.__file__).parents[2].glob('nvidia/*/include')
    return [
        *(STANDARD, '-arch=sm_90', '--use_fast_math', '-Xptxas=-O0', '-DMMVMAMBA_WITH_CUDA'),
        *cpp_extension.COMMON_NVCC_FLAGS,
        *(flag for folder in folders for flag in ('-isystem', folder)),
        *(f'-Xcompiler=-idirafter{folder}' for folder in sorted(packaged)),
    ]


@pytest.mark.skipif(NVCC is None or torch.version.cuda is None, reason='no nvcc on PATH, or torch without CUDA headers')
@pytest.mark.parametrize(
    'source',
    [
        'cross_scan/channel_last.cu',
        *(pytest.param(f'{name}.cu', marks=pytest.mark.slow) for name in ('fused/common/column_sum', 'ss2d/cuda')),
        pytest.param('selective_scan/fp16.cu', marks=pytest.mark.slow),
    ],
)
def test_cuda_sources_compile(source, tmp_path):
    """One file of each kind, its host code too, with as little optimisation as there is; test_with_nvcc builds all."""
    flags = [*cuda_flags(), '-Xcicc=-O0', '-Xcompiler=-O0']
    command = [NVCC, '-c', *flags, str(ROOT / 'ops/csrc' / source), '-o', str(tmp_path / 'out')]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_every_kernel_goes_through_launch():
    """The __global__ functions of launch.cuh wait for the kernel before, which launches overlap; no others exist."""
    folder = ROOT / 'ops/csrc'
    sources = {path.relative_to(folder): path.read_text() for path in folder.rglob('*.cu*')}
    sources = {path: re.sub(r'//.*', '', text) for path, text in sources.items()}
    assert [str(path) for path, text in sources.items() if '__global__' in text] == ['common/launch.cuh']
    assert [str(path) for path, text in sources.items() if '<<<' in text] == ['common/launch.cuh']
    starts = re.findall(r'__global__[^{]*{\s*([^\n]*)', sources[Path('common/launch.cuh')])
    assert starts and set(starts) == {'begin_kernel();'}


def test_another_cuda_than_that_of_torch_is_named(script):
    error = RuntimeError(cpp_extension.CUDA_MISMATCH_MESSAGE, '11.8', '13.0')  # as torch raises it
    assert script.words_of(error).startswith('The detected CUDA version (11.8) mismatches')
    assert '(13.0)' in script.words_of(error) and '%' not in script.words_of(error)
    assert script.words_of(ValueError('100%\n of it')) == '100% of it' and script.words_of(SystemExit()) == ''


@pytest.mark.slow
def test_without_nvcc(tree):
    folders = [f for f in os.environ['PATH'].split(os.pathsep) if not (Path(f) / 'nvcc').exists()]
    if shutil.which('c++', path=os.pathsep.join(folders)) is None:
        pytest.skip('nvcc lies in the folder of the compiler')
    target, info, _ = install(tree, PATH=os.pathsep.join(folders), CUDA_HOME='/no/such/folder')
    assert info['built'] == 'cpu' and 'nvcc is not found' in info['reason'] and "'cpu'" in use(target)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None or cpp_extension.CUDA_HOME is None, reason='nvcc is not on PATH')
def test_with_nvcc(tree):
    """Every CUDA source compiles, for one architecture and without a GPU, and the library loads."""
    target, info, words = install(tree, TORCH_CUDA_ARCH_LIST='9.0')
    assert info['built'] == 'cuda' and info['arches'] == ['9.0'], info['reason']
    assert 'compiling CUDA kernels for 9.0' in words and "'cpu'" in use(target)

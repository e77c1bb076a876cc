"""The documentation: it builds, its links lead somewhere, its commands parse, and its Python runs.

The commands run in test_docs_commands.py.
"""

import argparse
import importlib.util
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config

import mmvmamba.ops
from mmvmamba import VSSMBackbone
from tests.test_tools.conftest import load_tool

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / 'docs').glob('*.md'))
README = ROOT / 'README.md'
NOTEBOOK = ROOT / 'docs/tutorial.ipynb'
GENERATED = {'tutorial.md': NOTEBOOK}  # pages that a hook makes of other files
WEIGHTS = 'https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth'


def blocks(page: Path, language: str) -> list:
    """The code of a page, also of blocks that are indented in a tab."""
    found = re.findall(rf'^( *)```{language}\n(.*?)^\1```', page.read_text(), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found]


def commands() -> list:
    """Every line of every bash block, without its comment."""
    pages = (*PAGES, ROOT / 'benchmarks/results/README.md')
    lines = [(page, line) for page in pages for block in blocks(page, 'bash') for line in block.splitlines()]
    return [
        pytest.param(line.split('  #')[0].strip(), id=f'{page.stem}: {line}') for page, line in lines if line.strip()
    ]


def anchor(heading: str) -> str:
    return re.sub(r'[\s]+', '-', re.sub(r'[^\w\s.-]', '', heading.strip().lower())).replace('.', '')


def test_pages_and_navigation_agree():
    def leaves(entries):
        for entry in entries:
            value = next(iter(entry.values()))
            yield from leaves(value) if isinstance(value, list) else [value]

    navigation = yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav']
    assert sorted(leaves(navigation)) == sorted([*(page.name for page in PAGES), *GENERATED])


def test_the_readme_is_read_in_a_minute():
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    fold = '\n'.join(lines[:50])  # what is it, how accurate, how fast, in my config
    words = ('backbone for', 'top-1', 'Images/s', "type='mmvmamba.VSSMBackbone'", 'tested versions', 'original')
    assert all(word in fold for word in words)


@pytest.mark.parametrize('page', [README, *PAGES], ids=lambda page: page.stem)
def test_links_and_pictures_exist(page):
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if target.startswith('http'):
            assert re.fullmatch(r'https://(arxiv\.org/abs/\d{4}\.\d{5}|github\.com/[\w./-]+)', target), target
            continue
        file, _, fragment = target.partition('#')
        linked = GENERATED.get(file, page.parent / file) if file else page
        assert linked.is_file(), f'{page.name} links to {target}'
        if fragment:
            headings = re.findall(r'^#+ (.+)$', linked.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), f'{page.name} links to {target}'
    # paths of the repository that the text names
    for path in re.findall(r'`((?:configs|tools|docs|tests|requirements|mmvmamba)/[\w./*-]*)`', text):
        assert list(ROOT.glob(path.rstrip('/'))), f'{page.name} names {path}'


def test_pictures_are_small_and_all_used():
    pictures = sorted((ROOT / 'docs/pictures').glob('*'))
    text = ''.join(page.read_text() for page in (README, *PAGES))
    assert pictures and all(f'pictures/{path.name}' in text for path in pictures)
    assert sum(path.stat().st_size for path in pictures) < 800_000


def check_config(word: str) -> None:
    """Configs of the repository exist, and those of a codebase are found."""
    if word.startswith('configs/'):
        assert (ROOT / word).is_file(), word
    elif '::' in word:
        from mmvmamba.cli import read_config

        assert read_config(word).model


@pytest.mark.parametrize('line', commands())
def test_command_is_understood(line, monkeypatch, capsys):
    words = [word for word in shlex.split(line) if not re.fullmatch(r'[A-Z_]+=\S+', word)]  # without the environment
    for word in words:
        check_config(word)
    if words[0] == 'make':
        targets = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[:2] == ['python', '-m']:
        assert importlib.util.find_spec(words[2])
    elif words[:2] == ['python', '-c']:
        compile(words[2], line, 'exec')
    elif words[0] == 'cmake':
        assert words[1] == '--build' or (ROOT / words[2] / 'CMakeLists.txt').is_file()
    elif words[0].startswith('build/cpp/'):
        program = words[0].removeprefix('build/cpp/')
        assert f'add_executable({program} ' in (ROOT / 'docs/cpp/CMakeLists.txt').read_text()
    elif words[0] == 'python':
        script, arguments = words[1], words[2:]
        assert (ROOT / script).is_file()
        parse(script.removeprefix('tools/'), arguments, monkeypatch)
    elif words[0] == 'mim':
        assert words[1] in ('train', 'test', 'run') and words[2] in ('mmpretrain', 'mmdet', 'mmsegmentation')
        if words[1] == 'run':
            module = 'mmseg' if words[2] == 'mmsegmentation' else words[2]
            package = Path(importlib.util.find_spec(module).origin).parent
            assert list(package.glob(f'.mim/tools/**/{words[3]}.py'))
    elif words[0] == 'pip':
        assert words[1] == 'install'
    elif words[0] == 'pip-audit':
        assert Path(words[-1]) == Path('requirements/tested.txt') and (ROOT / words[-1]).is_file()
    elif words[0] == 'source':
        assert words[1] == '.venv/bin/activate'  # what make setup makes
    else:
        assert (ROOT / words[0]).is_file(), f'no such command: {line}'


class ParsedError(Exception):
    """Raised where a command line has been parsed."""


def parse(script: str, arguments: list, monkeypatch) -> None:
    """Let a tool parse a command line by its own parser, and stop it before it does anything."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, given=None, namespace=None):
        parse_args(self, given, namespace)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', stop)
    monkeypatch.setattr('sys.argv', [script, *arguments])
    monkeypatch.syspath_prepend((ROOT / 'tools' / script).parent)  # as when it is run
    main = load_tool(script).main
    with pytest.raises(SystemExit if arguments == ['--help'] else ParsedError):
        main(arguments) if main.__code__.co_argcount else main()


def snippets() -> list:
    return [
        pytest.param(block, id=f'{page.stem}-{i}')
        for page in (README, *PAGES)
        for i, block in enumerate(blocks(page, 'python'))
    ]


@pytest.mark.parametrize('code', snippets())
def test_python_runs(code, tmp_path):
    if code.startswith('_base_'):
        (tmp_path / 'config.py').write_text(code)
        assert Config.fromfile(tmp_path / 'config.py').model.backbone.type == 'mmvmamba.VSSMBackbone'
        return
    torch.manual_seed(0)
    if WEIGHTS in code:  # as the network would give it
        torch.save(VSSMBackbone('tiny-s1l8').state_dict(), tmp_path / 'weights.pth')
        code = code.replace(WEIGHTS, str(tmp_path / 'weights.pth'))
    namespace = {}
    exec(compile(code, 'docs', 'exec'), namespace)
    if isinstance(namespace.get('model'), dict):
        namespace['backbone'] = {k: v for k, v in namespace['model']['backbone'].items() if k != '_delete_'}
    if isinstance(namespace.get('backbone'), dict):
        from mmvmamba.registry import MODELS

        assert MODELS.build(namespace['backbone']).arch.depths == (2, 2, 8, 2)


def test_site_builds_without_a_dead_link(tmp_path):
    pytest.importorskip('mkdocs')
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / 'mkdocs.yml'), site_dir=str(tmp_path / 'site'), strict=True))
    built = {path.stem for path in (tmp_path / 'site').glob('*.html')}
    assert {Path(name).stem for name in (*(page.name for page in PAGES), *GENERATED)} <= built
    api = (tmp_path / 'site/api.html').read_text()
    for function in mmvmamba.ops.__all__:
        assert function == 'SCAN_MODES' or f'.{function}"' in api, f'{function} has no entry in docs/api.md'
    assert ':func:' not in api and '&gt;</code>_' not in api

"""tools/docs/check_pages.py: it names what is wrong with a page, and finds nothing wrong with the documentation."""

import shutil

import pytest

from tests.test_docs import ROOT
from tests.test_tools.conftest import load_tool

BROWSER = next(filter(None, map(shutil.which, load_tool('docs/check_pages.py').BROWSERS)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason='no Chromium on PATH; Debian: apt-get install chromium')
PAGE = '<html><head></head><body><article style="width:100%">{}</article></body></html>'


@pytest.mark.slow
@needs_browser
def test_what_is_wrong_is_named(tmp_path, capsys):
    for name, content in dict(
        index='<table><tr><td>fits</td></tr></table>',
        wide='<table style="width:2000px"><tr><td>too wide</td></tr></table>',
        narrow='<table><tr><td style="width:1px;word-break:break-all">squeezed</td></tr></table>',
        lost='<img src="none.png">',
        error='<script>console.error("oh")</script>',
    ).items():
        (tmp_path / f'{name}.html').write_text(PAGE.format(content))
    tool = load_tool('docs/check_pages.py')
    assert tool.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert 'wide.html at 1200: TABLE of 2000 px' in said and 'too wide' in said
    assert 'narrow.html at 400: a column is squeezed: squeezed' in said
    assert 'cannot load' in said and 'none.png' in said and 'error.html at 400: oh' in said
    assert 'index.html' not in said and '10 views of 5 pages, 8 with problems' in said


def test_a_site_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    tool = load_tool('docs/check_pages.py')
    monkeypatch.setattr(tool, 'BROWSERS', ('sh',))
    assert tool.main([str(tmp_path)]) == 2 and 'run make docs first' in capsys.readouterr().err
    monkeypatch.setattr(tool, 'BROWSERS', ('no-such-browser',))
    assert tool.main([str(tmp_path)]) == 2 and 'apt-get install chromium' in capsys.readouterr().err


@pytest.mark.slow
@needs_browser
def test_every_page_of_the_documentation_fits(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / 'mkdocs.yml'), site_dir=str(tmp_path / 'site'), strict=True))
    found = load_tool('docs/check_pages.py').check(tmp_path / 'site', BROWSER)
    assert len(found) > 30 and {page: problems for page, problems in found.items() if problems} == {}

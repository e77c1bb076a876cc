"""The checks of ``make lint`` are those of every commit and of CI."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_pre_commit_and_ci_run_what_lint_does():
    makefile = (ROOT / 'Makefile').read_text()
    checks = re.search(r'^lint: ([^#]+)', makefile, re.MULTILINE)[1].split()
    assert checks == ['ruff', 'clang-format', 'codespell', 'types', 'docs']
    assert all(re.search(rf'^{check}: .*\n\t', makefile, re.MULTILINE) for check in checks)
    (local,) = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    assert [hook['entry'] for hook in local['hooks']] == [f'make {check}' for check in checks]
    assert re.findall(r'^make .*', (ROOT / '.ci/run').read_text(), re.MULTILINE) == ['make lint', 'make test']

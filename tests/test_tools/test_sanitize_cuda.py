"""tools/benchmark/sanitize_cuda.sh: what counts as success, with a stand-in for compute-sanitizer."""

import os
import subprocess

import pytest

from tests.test_tools.conftest import ROOT

CLOSING = '300 cases through the kernels beside ops/__init__.py'
LIBRARY = 'Race reported between Write access at void cutlass::Kernel2 and Read access at void cutlass::Kernel2'
OWN = 'Race reported between Write access at mmvmamba::scan::forward and Read access at mmvmamba::scan::forward'


@pytest.fixture
def sanitize(tmp_path):
    """Function (words, exit code, tools) that runs the script while compute-sanitizer says and returns that."""

    def run(words, code, *tools):
        fake = tmp_path / 'compute-sanitizer'
        lines = ''.join(f"echo '{line}'\n" for line in words)
        fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{lines}exit {code}\n')
        fake.chmod(0o755)
        return subprocess.run(
            [ROOT / 'tools/benchmark/sanitize_cuda.sh', *tools],
            env={**os.environ, 'PATH': f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'},
            capture_output=True,
            text=True,
        )

    return run


def test_all_tools_run_to_the_end(sanitize, tmp_path):
    assert sanitize([CLOSING], 0).returncode == 0
    calls = (tmp_path / 'calls').read_text().splitlines()
    assert [call.split()[1] for call in calls] == ['memcheck', 'racecheck', 'synccheck']
    assert all('--error-exitcode 9' in call and 'tests/test_ops/sanitized.py cuda' in call for call in calls)


@pytest.mark.parametrize('tool', ['memcheck', 'racecheck', 'synccheck'])
@pytest.mark.parametrize('code', [0, 9])
def test_a_program_that_dies_midway_is_no_success(sanitize, tool, code):
    result = sanitize([LIBRARY, 'RuntimeError: no kernel image'], code, tool)
    assert result.returncode != 0
    if code == 0 or tool == 'racecheck':
        assert f'error: {tool}: the program ended before its last case' in result.stderr


def test_only_racecheck_forgives_and_only_the_kernels_of_libraries(sanitize):
    assert sanitize([LIBRARY, CLOSING], 9, 'racecheck').returncode == 0
    assert sanitize([LIBRARY, OWN, CLOSING], 9, 'racecheck').returncode == 9
    assert sanitize([LIBRARY, CLOSING], 9, 'memcheck').returncode == 9
    assert sanitize([CLOSING], 1, 'racecheck').returncode == 1


def test_without_compute_sanitizer_it_says_where_it_comes_from(tmp_path):
    script = ROOT / 'tools/benchmark/sanitize_cuda.sh'
    result = subprocess.run(['/bin/bash', script], env={'PATH': str(tmp_path)}, capture_output=True, text=True)
    assert result.returncode == 2 and 'compute-sanitizer is not on PATH' in result.stderr

"""Set-up: what it checks first, what its messages say, and that finished steps are not done again."""

import subprocess
import sys
from types import SimpleNamespace

import pytest


@pytest.fixture(scope='module')
def setup_env(tool):
    return tool('setup_env.py')


def test_without_a_compiler_only_compiled_mmcv_is_out_of_reach(setup_env, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    with pytest.raises(setup_env.SetupError, match=r"no C\+\+ compiler: 'no-such-compiler' .* Install one"):
        setup_env.check_machine(tmp_path, 'compiled')
    assert capsys.readouterr().out == ''
    monkeypatch.setattr(setup_env, 'DISK_GIB', 0)
    setup_env.check_machine(tmp_path, 'lite')
    said = capsys.readouterr().out
    assert "'no-such-compiler' is not on PATH. Everything works but the compiled extension" in said


def test_what_is_installed(setup_env):
    for mmcv in ('lite', 'compiled'):
        for gpu in (False, True):
            files = setup_env.package_files(mmcv, gpu)
            texts = [(setup_env.REQUIREMENTS / f'{name}.txt').read_text() for name in files]
            names = [line.split('==')[0] for text in texts for line in text.splitlines() if '==' in line]
            assert len(set(names)) == len(names)
            assert 'torch' in names and 'mmdet' in names
            assert ('nvidia-cusolver' in names) == (gpu or mmcv == 'compiled')
            assert ('mmcv-lite' in names) == (mmcv == 'lite')


def test_uv_installs_from_the_index_of_pip_and_pip_goes_on_where_uv_can_not(setup_env, monkeypatch, tmp_path, capsys):
    env, done = setup_env.Environment(tmp_path), []

    def run(step, command, advice, **environment):
        done.append((command[2], *command[3:], environment))
        if command[2] == 'uv' and not works:
            raise setup_env.SetupError('installing failed')

    monkeypatch.setattr(setup_env, 'run', run)
    monkeypatch.setenv('PIP_INDEX_URL', 'https://index.example/simple')
    monkeypatch.delenv('UV_DEFAULT_INDEX', raising=False)
    for works in (True, False):
        done.clear()
        setup_env.install_packages(env, ['torch', 'dev'])
        assert [program for program, *_ in done] == ['pip', 'uv', *([] if works else ['pip'])]
        assert done[1][-1] == {'UV_DEFAULT_INDEX': 'https://index.example/simple'}
        for _, *arguments, _ in done[1:]:
            assert '--no-deps' in arguments and str(setup_env.REQUIREMENTS / 'dev.txt') in arguments
        assert ('pip goes on' in capsys.readouterr().out) is not works


def test_the_build_says_how_far_it_is(setup_env, monkeypatch, capsys):
    clock = iter([0.0, 4.0, 5.0, 20.0])
    monkeypatch.setattr(setup_env.time, 'time', lambda: next(clock))
    progress = setup_env.BuildProgress()
    for line in ('  [1/5] c++ -c a.cpp\n', '  mmvmamba: compiling\n', '  [2/5] c++ -c b.cpp\n'):
        progress(line)
    assert capsys.readouterr().out.splitlines() == [
        '[setup]   mmvmamba: compiling',
        '[setup]   2 of 5 files compiled, about 30 s left',
    ]


def test_wrong_python(setup_env, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env, 'PYTHONS', ((3, 99), (3, 100)))
    with pytest.raises(setup_env.SetupError, match=r'Python is 3.* PYTHON='):
        setup_env.check_machine(tmp_path, 'lite')


def test_full_disk(setup_env, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env.shutil, 'disk_usage', lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(setup_env.SetupError, match='1 GiB are free'):
        setup_env.check_machine(tmp_path, 'lite')


@pytest.mark.parametrize(
    'output, advice',
    [
        ('Max retries exceeded with url: /simple/torch/', 'check the network'),
        ('OSError: [Errno 28] No space left on device', 'disk is full'),
        ('error: something else', 'the usual advice'),
    ],
)
def test_a_failed_step_says_what_to_do(setup_env, output, advice, capsys):
    command = [sys.executable, '-c', f'import sys; print({output!r}); sys.exit(3)']
    with pytest.raises(setup_env.SetupError, match=rf'installing things failed \(exit code 3\).*{advice}'):
        setup_env.run('installing things', command, 'the usual advice')
    assert output in capsys.readouterr().err


def test_steps_are_done_once_and_again_after_an_interruption_or_a_change(setup_env, tmp_path):
    env, done = setup_env.Environment(tmp_path), []

    def interrupted():
        done.append('part')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        env.step('packages', 'key', 'installing', interrupted)
    for _ in range(2):
        env.step('packages', 'key', 'installing', lambda: done.append('whole'))
    env.step('packages', 'another key', 'installing', lambda: done.append('changed'))
    assert done == ['part', 'whole', 'changed']


def test_an_unusable_environment_is_made_anew(setup_env, tmp_path, monkeypatch):
    env = setup_env.Environment(tmp_path / 'env')
    (tmp_path / 'env/bin').mkdir(parents=True)
    env.python.write_text('#!/bin/sh\nexit 1\n')
    env.python.chmod(0o755)
    made = []
    monkeypatch.setattr(setup_env.venv, 'create', lambda folder, **options: made.append((folder, options['clear'])))
    env.create()
    assert made == [(tmp_path / 'env', True)]


def test_make_help_lists_the_commands(request):
    text = subprocess.run(['make', 'help'], cwd=request.config.rootpath, capture_output=True, text=True).stdout
    assert all(command in text for command in ('demo', 'test', 'setup', 'lint'))

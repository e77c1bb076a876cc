"""The file that a benchmark writes: where, with which versions, from which commit and by which command it measured."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = ('torch', 'triton', 'mmvmamba', 'mmpretrain', 'timm', 'torchvision', 'transformers')
ROOT = Path(__file__).resolve().parents[2]


def machine_name(device: str) -> str:
    """The GPU, or the processor and the number of threads."""
    if device == 'cuda':
        return torch.cuda.get_device_name()
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    models = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return f'{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads'


def versions() -> dict:
    """Versions of Python, CUDA and the packages that are installed."""
    found = dict(python=platform.python_version())
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return dict(found, torch=torch.__version__, **(dict(cuda=torch.version.cuda) if torch.version.cuda else {}))


def commit() -> str:
    """The commit of the working tree, with ``-dirty`` if it has changes; of a copy without git ``MMVMAMBA_COMMIT``."""
    if 'MMVMAMBA_COMMIT' in os.environ:
        return os.environ['MMVMAMBA_COMMIT']
    command = ['git', 'describe', '--always', '--dirty', '--exclude=*']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else 'unknown'


def write(path: Path, device: str, rows: list, add: bool = False, **more) -> None:
    """Write a report.

    Args:
        path (Path): The JSON file.
        device (str): ``cpu`` or ``cuda``.
        rows (list[dict]): What was measured.
        add (bool): Keep the rows that the file already has.
        **more: Other facts of the run.

    Raises:
        SystemExit: With ``add``, if the file is of another machine, other versions or another commit.
    """
    report = dict(machine=machine_name(device), versions=versions(), commit=commit(), **more)
    commands = [shlex.join(['python', *sys.argv])]
    if add and path.exists():
        old = json.loads(path.read_text())
        for key, value in report.items():
            if old[key] != value:
                raise SystemExit(f'--add: {path} has {key} {old[key]!r}, this run has {value!r}; write another file')
        rows, commands = old['rows'] + rows, old['commands'] + commands
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(report, commands=commands, rows=rows), indent=1) + '\n')

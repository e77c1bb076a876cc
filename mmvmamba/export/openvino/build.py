"""Building the library against the headers that OpenVINO's wheel brings; it fits that release of OpenVINO only."""

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from mmvmamba.ops.extension import FOLDER as _OPS

FOLDER = Path(__file__).parent
PREFIX = 'mmvmamba_openvino-'
INSTALL = 'pip install mmvmamba[openvino]'
_KERNELS = _OPS / 'csrc'
SOURCES = (_KERNELS / 'ss2d/cpu_tile.cpp', FOLDER / 'csrc/scan.cpp')
HEADERS = (
    *(_KERNELS / name for name in ('ss2d/cpu_tile.h', 'common/elementary.h', 'common/routes.h', 'common/ceil_div.h')),
    FOLDER.parent / 'csrc/scan_map.h',
)
# those of setup.py, so that a number is the one of the other libraries
FLAGS = ('-std=c++17', '-O3', '-g0', '-fno-math-errno', '-fno-trapping-math', '-ffp-contract=fast')
_LIBRARIES = ('openvino', 'tbb')


@dataclass(frozen=True)
class OpenVINO:
    """The installed OpenVINO.

    Attributes:
        folder (Path): Where its wheel lies.
        version (str): All that it says of its version, such as ``2026.4.1-22982-e213a147257-releases/2026/4``.
        release (str): The part before the first hyphen.
    """

    folder: Path
    version: str

    @property
    def release(self) -> str:
        return self.version.partition('-')[0]


def find_openvino() -> OpenVINO:
    """The installed OpenVINO.

    Raises:
        ImportError: If it cannot be imported; says how to get it.
    """
    module = import_openvino()
    return OpenVINO(Path(module.__file__).parent, module.get_version())


def import_openvino() -> Any:
    """Import OpenVINO, which is optional; errors as in :func:`find_openvino`."""
    try:
        import openvino
    except ImportError as error:
        raise ImportError(f'OpenVINO cannot be imported ({error}); get it by: {INSTALL}') from error
    return openvino


def file_name() -> str:
    """Name of the library's file, which tells the OpenVINO and the sources that it is made of."""
    found = find_openvino()
    content = hashlib.sha256(repr((found.version, FLAGS)).encode())
    for path in (*SOURCES, *HEADERS):
        content.update(path.read_bytes())
    return f'{PREFIX}{found.release}-{content.hexdigest()[:12]}.so'


def build_library(folder: Optional[Path] = None) -> Path:
    """Build the library for the installed OpenVINO; those of the same release that were there before go.

    Args:
        folder (Path, optional): Where to. Default: in the package, where :func:`openvino_library` finds it.

    Returns:
        Path: The file.

    Raises:
        ImportError: If OpenVINO cannot be imported.
        FileNotFoundError: If there is no C++ compiler, or OpenVINO came without headers or libraries.
        PermissionError: If the folder cannot be written to.
        RuntimeError: If the compiler fails; with its last words.
    """
    folder = FOLDER if folder is None else folder
    found, path = find_openvino(), folder / file_name()
    compiler = os.environ.get('CXX', 'c++').split()
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f'no C++ compiler: {compiler[0]!r} is not on PATH; install g++ or clang, or set CXX')
    if not os.access(folder, os.W_OK):
        raise PermissionError(f'{str(folder)!r}, where the library goes, cannot be written to')
    partial = folder / f'.{path.name}.{os.getpid()}'
    command = [*compiler, *FLAGS, *_options(found), *map(str, SOURCES), *_links(found), '-o', str(partial)]
    try:
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode:
            raise RuntimeError(f'the compiler failed: {" ".join(said.stderr.split())[-600:]}')
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    for other in folder.glob(f'{PREFIX}{found.release}-*.so'):
        if other != path:
            other.unlink()
    return path


def _options(found: OpenVINO) -> list:
    include = found.folder / 'include'
    if not (include / 'openvino/core/op_extension.hpp').is_file():
        raise FileNotFoundError(f'{str(include)!r} has no headers of OpenVINO; its wheels bring them: {INSTALL}')
    version = f'-DMMVMAMBA_OPENVINO="{found.version}"'
    options = ['-shared', '-fPIC', '-fvisibility=hidden', '-s', f'-I{_KERNELS}', '-isystem', str(include), version]
    told = (found.folder / 'cmake/OpenVINOConfig.cmake').read_text()
    abi = re.search(r'OpenVINO_GLIBCXX_USE_CXX11_ABI "(\d)"', told)  # of the compiler that OpenVINO was built with
    return [*options, *([f'-D_GLIBCXX_USE_CXX11_ABI={abi.group(1)}'] if abi else [])]


def _links(found: OpenVINO) -> list:
    """OpenVINO's libraries by their full names, which are those that the process has loaded by then."""
    folder, names = found.folder / 'libs', []
    for name in _LIBRARIES:
        files = sorted(folder.glob(f'lib{name}.so*'))
        if not files:
            raise FileNotFoundError(f'{str(folder)!r} has no lib{name}.so; the wheels of OpenVINO bring it: {INSTALL}')
        names.append(f'-l:{files[0].name}')
    return [f'-L{folder}', *names]

"""The build: the Python packages, mim's files, and an optional compiled extension; metadata lies in pyproject.toml.

The extension never breaks an install.  ``MMVMAMBA_BUILD`` (``cpu``, ``cuda`` or ``none``) overrides what is built, and
``TORCH_CUDA_ARCH_LIST`` for which GPUs: by default the visible one.  What was built, or why nothing was, is written to
``mmvmamba/ops/_build_info.json``, where the op backends read it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, __version__, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
CSRC = str(ROOT / 'ops/csrc')  # includes name an op's room
MIM_FILES = ('configs', 'tools', 'model-index.yml')
REBUILD = 'pip install --no-build-isolation --no-deps --force-reinstall .'
ARCHES = ('8.0', '8.6', '8.9', '9.0', '10.0', '10.3', '11.0', '12.0', '12.1')
NEWEST_CXX17_TORCH = (2, 12)  # later headers need C++20
# vectorising comparisons needs to know that they don't trap; NaN and infinity keep their meaning
FLAGS = ('-O3', '-g0', '-fno-math-errno', '-fno-trapping-math', '-ffp-contract=fast')
LIBRARY = Path('mmvmamba/export/onnxruntime/mmvmamba_onnxruntime.so')
# files compiled as one for all rooms: torch's headers take the compiler longer than what a room says with them
UNITED = (('autograd.cpp',), ('cpu.cpp', 'constants.cpp'), ('cuda.cpp',))


def find_torch():
    """torch's build helpers, or the reason why there are none."""
    try:
        import torch
        from torch.utils import cpp_extension

        return torch, cpp_extension, ''
    except ImportError as error:
        return (
            None,
            None,
            (
                f'torch can not be imported while building ({error}), as in an isolated build; '
                f'install torch first and use: {REBUILD}'
            ),
        )


def choose_build(torch, cpp_extension) -> tuple:
    """What to build, ``cpu``, ``cuda`` or ``none``, and why."""
    wanted = os.environ.get('MMVMAMBA_BUILD', '')
    if wanted not in ('', 'cpu', 'cuda', 'none'):
        sys.exit(f'MMVMAMBA_BUILD is {wanted!r}, expected cpu, cuda or none')
    if wanted == 'none':
        return 'none', 'MMVMAMBA_BUILD=none'
    compiler = os.environ.get('CXX', 'c++').split()[0]
    if shutil.which(compiler) is None:
        return (
            'none',
            f'no C++ compiler: {compiler!r} is not on PATH; install g++ or clang (or set CXX), then: {REBUILD}',
        )
    if wanted == 'cpu':
        return 'cpu', 'MMVMAMBA_BUILD=cpu'
    asked = wanted == 'cuda' or os.environ.get('TORCH_CUDA_ARCH_LIST')
    nvcc = find_nvcc(cpp_extension)
    if torch.version.cuda is None or not nvcc:
        reason = (
            'torch is built without CUDA'
            if torch.version.cuda is None
            else f'nvcc is not found; install the CUDA {torch.version.cuda} toolkit or set CUDA_HOME'
        )
        if wanted == 'cuda':
            print(f'mmvmamba: MMVMAMBA_BUILD=cuda, but {reason}', file=sys.stderr)
        return 'cpu', reason
    if not asked and not torch.cuda.is_available():
        return (
            'cpu',
            f"no GPU is visible; for its part name its architecture: TORCH_CUDA_ARCH_LIST='9.0' {REBUILD}",
        )
    return 'cuda', f'nvcc of {cpp_extension.CUDA_HOME}'


def find_nvcc(cpp_extension) -> str:
    """Path of nvcc, or an empty string; tells torch where the toolkit really lies.

    torch takes the folder above nvcc's for the toolkit, which is wrong if the nvcc on PATH is a script that calls
    another; nvcc itself knows.
    """
    nvcc = cpp_extension.CUDA_HOME and shutil.which('nvcc', path=str(Path(cpp_extension.CUDA_HOME) / 'bin'))
    if nvcc and not (Path(cpp_extension.CUDA_HOME) / 'include/cuda_runtime_api.h').is_file():
        command = [nvcc, '--dryrun', '-x', 'cu', '-c', os.devnull, '-o', os.devnull]
        said = subprocess.run(command, capture_output=True, text=True)
        top = re.search(r'^#\$ TOP=(.+)$', said.stdout + said.stderr, re.MULTILINE)
        if top:
            cpp_extension.CUDA_HOME = str(Path(top.group(1)).resolve())
    return nvcc or ''


def cuda_arches(nvcc: str, cpp_extension, visible: tuple = ()) -> str:
    """The GPU architectures to compile for, as far as nvcc and torch know them.

    TORCH_CUDA_ARCH_LIST, else those of the visible GPUs, else ARCHES.
    """
    if os.environ.get('TORCH_CUDA_ARCH_LIST'):
        return os.environ['TORCH_CUDA_ARCH_LIST']
    listed = subprocess.run([nvcc, '--list-gpu-arch'], capture_output=True, text=True, check=True).stdout
    known = re.findall(r'compute_(\d+)\b', listed)

    def both_know(arches):
        return [arch for arch in arches if arch.replace('.', '') in known and torch_knows(arch, cpp_extension)]

    if visible and both_know(visible) == list(visible):
        return ';'.join(visible)
    arches = both_know(ARCHES)
    if not arches:
        raise RuntimeError(f'nvcc and torch have none of the GPU architectures {", ".join(ARCHES)} in common')
    return ';'.join(arches) + '+PTX'


def visible_arches() -> tuple:
    """The architectures of the GPUs that torch sees, such as ``('9.0',)``; none if the wish is for all."""
    import torch

    if os.environ.get('MMVMAMBA_BUILD') == 'cuda' or not torch.cuda.is_available():
        return ()
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple('{}.{}'.format(*capability) for capability in sorted(capabilities))


def torch_knows(arch: str, cpp_extension) -> bool:
    """Whether torch compiles for an architecture; what is newer than torch itself it refuses."""
    try:
        return bool(arch_flags(arch, cpp_extension))
    except ValueError:
        return False


def arch_flags(arches: str, cpp_extension) -> list:
    """nvcc's flags for architectures listed as in TORCH_CUDA_ARCH_LIST."""
    os.environ['TORCH_CUDA_ARCH_LIST'] = arches
    return cpp_extension._get_cuda_arch_flags()


def built_arches(flags: list) -> list:
    """The architectures that nvcc's flags name, such as ``['8.0', '9.0+PTX']``."""
    codes = re.findall(r'code=(sm|compute)_(\d+)(\d)([af]?)\b', ' '.join(flags))
    names = sorted({(int(major), minor, suffix) for _, major, minor, suffix in codes})
    ptx = {(int(major), minor, suffix) for kind, major, minor, suffix in codes if kind == 'compute'}
    return ['{}.{}{}'.format(*name) + '+PTX' * (name in ptx) for name in names]


def words_of(error: BaseException) -> str:
    """What an error says, on one line; torch leaves the values of some beside their message."""
    message, *values = error.args or ('',)
    filled = values and isinstance(message, str) and message.count('%s') == len(values)
    return ' '.join((message % tuple(values) if filled else str(error)).split())


def find_sources(kind: str) -> list:
    """Paths of what is compiled: in a CPU build all C++ but ``cuda*.cpp``; in a CUDA build everything."""
    files = [path for path in Path('ops/csrc').rglob('*') if path.suffix in ('.cpp', '.cu')]
    return sorted(str(path) for path in files if kind == 'cuda' or not (path.suffix == '.cu' or path.stem == 'cuda'))


def unite(sources: list, folder: Path = Path('build/united')) -> list:
    """Let one file, which includes them, stand for all sources of each group in UNITED."""
    folder.mkdir(parents=True, exist_ok=True)
    united, rest = [], list(sources)
    for names in UNITED:
        group = [path for path in sources if Path(path).name in names]
        if group:
            file = folder / names[0]
            file.write_text(''.join(f'#include "{os.path.relpath(path, "ops/csrc")}"\n' for path in group))
            united.append(str(file))
            rest = [path for path in rest if path not in group]
    return united + rest


def use_ccache(cpp_extension) -> None:
    """Compile through ccache where it is installed, unless CXX says otherwise or torch does so by itself."""
    if shutil.which('ccache') and 'CXX' not in os.environ and not hasattr(cpp_extension, '_wrap_compiler'):
        os.environ['CXX'] = 'ccache c++'


def language(torch) -> str:
    """The compilers' flag for the C++ that torch's headers are written in."""
    version = tuple(int(part) for part in torch.__version__.split('+')[0].split('.')[:2])
    return '-std=c++20' if version > NEWEST_CXX17_TORCH else '-std=c++17'


def make_extension(kind: str, torch, cpp_extension) -> Extension:
    """The extension ``mmvmamba.ops._C``; a plain shared library without Python symbols."""
    sources = unite(find_sources(kind))
    standard = language(torch)
    flags = [*FLAGS, standard]
    flags += ['-fopenmp'] if sys.platform == 'linux' else []
    if kind == 'cpu':
        extension = cpp_extension.CppExtension(
            'mmvmamba.ops._C', sources, include_dirs=[CSRC], extra_compile_args=flags, extra_link_args=flags[-1:]
        )
        return without_python(extension)
    nvcc = find_nvcc(cpp_extension)
    arches = cuda_arches(nvcc, cpp_extension, visible_arches())
    print(f'mmvmamba: compiling CUDA kernels for {arches}', flush=True)
    # headers that a slim toolkit lacks, after the toolkit's own
    packaged = [str(path) for path in sorted(Path(cpp_extension.__file__).parents[2].glob('nvidia/*/include'))]
    flags += [f'-idirafter{path}' for path in packaged]
    # given here, since torch leaves its own out if any flag holds the word arch, be it in the name of a folder
    nvcc_flags = ['-O3', standard, '--use_fast_math', '-lineinfo', *arch_flags(arches, cpp_extension)]
    nvcc_flags += [f'-Xcompiler=-idirafter{path}' for path in packaged]
    extension = cpp_extension.CUDAExtension(
        'mmvmamba.ops._C',
        sources,
        include_dirs=[CSRC],
        define_macros=[('MMVMAMBA_WITH_CUDA', None)],
        extra_compile_args=dict(cxx=flags, nvcc=nvcc_flags),
        extra_link_args=['-fopenmp'] if sys.platform == 'linux' else [],
    )
    return without_python(extension)


def without_python(extension: Extension) -> Extension:
    """Link nothing of Python, which a C++ program that loads the ops may not have."""
    extension.libraries = [name for name in extension.libraries if name != 'torch_python']
    return extension


class OptionalBuildExt(build_ext):
    """Build the extension if that is possible; else say what is missing and go on."""

    def run(self):
        torch, cpp_extension, reason = find_torch()
        kind = 'none'
        if torch is not None:
            kind, reason = choose_build(torch, cpp_extension)
        error = self._compile(kind, torch, cpp_extension) if kind != 'none' else ''
        if error and os.environ.get('MMVMAMBA_WHEEL'):
            sys.exit(f'mmvmamba: no wheel, since the {kind} build failed: {error}')
        if error and kind == 'cuda':
            print(f'mmvmamba: the CUDA build failed, building for CPU only: {error}', file=sys.stderr, flush=True)
            cuda_error, kind = error, 'cpu'
            error = self._compile('cpu', torch, cpp_extension)
            reason = f'the CUDA build failed: {cuda_error}'
        if error:
            hint = f' (torch {torch.__version__} needs a C++20 compiler)' if language(torch) == '-std=c++20' else ''
            kind, reason = 'none', f'compilation failed{hint}: {error}; mend it, then: {REBUILD}'
        message = f'mmvmamba: compiled extension: {kind} ({reason})'
        print(message, file=sys.stdout if kind != 'none' else sys.stderr, flush=True)
        arches = built_arches(arch_flags(os.environ['TORCH_CUDA_ARCH_LIST'], cpp_extension)) if kind == 'cuda' else []
        self._write_info(kind, reason, torch, arches, self._compile_for_onnxruntime())

    def _compile(self, kind: str, torch, cpp_extension) -> str:
        """Compile and return an empty string, or the error."""
        command = cpp_extension.BuildExtension(self.distribution, no_python_abi_suffix=True)
        try:
            use_ccache(cpp_extension)
            self.distribution.ext_modules = [make_extension(kind, torch, cpp_extension)]
            command.inplace, command.build_lib, command.build_temp = self.inplace, self.build_lib, self.build_temp
            command.ensure_finalized()
            command.get_export_symbols = lambda extension: []  # no PyInit: torch loads the library
            command.run()
        except (Exception, SystemExit) as error:  # distutils, ninja and nvcc each raise their own
            return f"{words_of(error)[-400:]} (run pip with -v for the compiler's words)"
        finally:
            self.distribution.ext_modules = [PLACEHOLDER]
        return ''

    def _compile_for_onnxruntime(self) -> str:
        """Compile the library for onnxruntime, which needs no torch; returns an empty string, or why there is none."""
        if os.environ.get('MMVMAMBA_BUILD') == 'none':
            return 'MMVMAMBA_BUILD=none'
        compiler = os.environ.get('CXX', 'c++').split()
        if shutil.which(compiler[0]) is None:
            return f'no C++ compiler: {compiler[0]!r} is not on PATH'
        folder = ROOT / LIBRARY.parent if self.inplace else Path(self.build_lib) / LIBRARY.parent
        folder.mkdir(parents=True, exist_ok=True)
        sources = [f'{CSRC}/ss2d/cpu_tile.cpp', str(ROOT / LIBRARY.parent / 'csrc/scan.cpp')]
        flags = ['-std=c++17', *FLAGS, '-shared', '-fPIC', '-fvisibility=hidden', '-s', f'-I{CSRC}']
        command = [*compiler, *flags, *sources, '-o', str(folder / LIBRARY.name)]
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode:
            words = ' '.join(said.stderr.split())[-400:]
            print(f'mmvmamba: no library for onnxruntime: {words}', file=sys.stderr, flush=True)
            return f'compilation failed: {words}'
        return ''

    def _write_info(self, kind, reason, torch, arches, onnxruntime):
        folder = ROOT / 'ops' if self.inplace else Path(self.build_lib) / 'mmvmamba/ops'
        folder.mkdir(parents=True, exist_ok=True)
        info = dict(built=kind, reason=reason, torch=torch and torch.__version__, arches=arches)
        info['onnxruntime'] = onnxruntime  # why its library is not there, or nothing
        (folder / '_build_info.json').write_text(json.dumps(info, indent=2) + '\n')

    def get_outputs(self):
        if self.inplace:
            return []
        built = (Path(self.build_lib) / 'mmvmamba/ops').glob('_*')
        library = Path(self.build_lib) / LIBRARY
        return [
            *(str(path) for path in built if path.suffix in ('.so', '.json')),
            *([str(library)] if library.is_file() else []),
        ]

    def get_output_mapping(self):
        return {}


PLACEHOLDER = Extension('mmvmamba.ops._C', ['ops/csrc/common/constants.cpp'])


class BuildWithMim(build_py):
    """Put configs, tools and the model index into ``mmvmamba/.mim`` for mim: links if editable, else copies."""

    def run(self):
        super().run()
        target = ROOT / 'mmvmamba/.mim' if self.editable_mode else Path(self.build_lib) / 'mmvmamba/.mim'
        if target.exists():
            shutil.rmtree(target)
        target.mkdir(parents=True)
        for name in MIM_FILES:
            source = ROOT / name
            if self.editable_mode:
                (target / name).symlink_to(os.path.relpath(source, target))
            elif source.is_dir():
                shutil.copytree(source, target / name, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(source, target / name)


class EditableWithMim(editable_wheel):
    """Tell mim where an editable package lies.

    mim joins the install location with the first line of ``top_level.txt``; an absolute path there leads it to the
    source tree, since pip >= 25 leaves no link of its own.
    """

    def _ensure_dist_info(self):
        super()._ensure_dist_info()
        top_level = Path(self.dist_info_dir) / 'top_level.txt'
        top_level.write_text(f'{ROOT / "mmvmamba"}\n')


def wheel_tag() -> str:
    """The local version of a wheel that ``make wheels`` builds: for which torch, and for its CUDA or a CPU."""
    torch, cpp_extension, reason = find_torch()
    kind = 'none'
    if torch is not None:
        kind, reason = choose_build(torch, cpp_extension)
    if kind == 'none':
        sys.exit(f'a wheel needs the extension: {reason}')
    release = '.'.join(torch.__version__.split('+')[0].split('.')[:2])
    return f'+torch{release}' + ('cpu' if kind == 'cpu' else 'cu' + torch.version.cuda.replace('.', ''))


if int(__version__.split('.')[0]) < 77:  # which pip checks in isolated builds only
    sys.exit(f"setuptools is {__version__}, expected 77 or later: pip install 'setuptools>=77,<82'")
setup(
    packages=[
        *find_packages(include=['mmvmamba*']),
        'mmvmamba.ops',
        *(f'mmvmamba.ops.{name}' for name in find_packages('ops')),
    ],
    package_dir={'mmvmamba.ops': 'ops'},
    ext_modules=[PLACEHOLDER],
    options=dict(egg_info=dict(tag_build=wheel_tag())) if os.environ.get('MMVMAMBA_WHEEL') else {},
    cmdclass=dict(build_ext=OptionalBuildExt, build_py=BuildWithMim, editable_wheel=EditableWithMim),
)

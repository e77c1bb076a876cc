"""What this installation can do: versions, known traps with their remedies, op backends and one timed op each.

Run as ``python -m mmvmamba.doctor``; the exit code is 1 if a trap was found.  Packages are recognised by their
metadata; only one without is imported, since some of the traps break the import.
"""

import importlib
import platform
import re
import sys
import time
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Optional

import torch

from mmvmamba import compat, mmcv_ops
from mmvmamba.mmcv_ops.finder import COMPILE
from mmvmamba.ops import backend_report, selective_scan

# by the name used here: the distributions that provide it, and its module
PACKAGES = {
    'mmvmamba': (('mmvmamba',), 'mmvmamba'),
    'torch': (('torch',), 'torch'),
    'torchvision': (('torchvision',), 'torchvision'),
    'triton': (('triton',), 'triton'),
    'mmengine': (('mmengine', 'mmengine-lite', 'onedl-mmengine'), 'mmengine'),
    'mmcv': (('mmcv', 'mmcv-lite', 'onedl-mmcv'), 'mmcv'),
    'mmdet': (('mmdet', 'onedl-mmdetection'), 'mmdet'),
    'mmsegmentation': (('mmsegmentation', 'onedl-mmsegmentation'), 'mmseg'),
    'mmpretrain': (('mmpretrain', 'onedl-mmpretrain'), 'mmpretrain'),
    'openmim': (('openmim', 'onedl-mim'), 'mim'),
    'numpy': (('numpy',), 'numpy'),
    'setuptools': (('setuptools',), 'setuptools'),
    'transformers': (('transformers',), 'transformers'),
    'imgaug': (('imgaug',), 'imgaug'),
}
SAFE_LOADING = (2, 6)  # from this torch on, torch.load refuses the classes it was not told of
PLACE = 'python -m mmvmamba.mmcv_ops place'
TIMED_SHAPE = (2, 4, 24, 196)  # batch, groups, channels of a group, L


@dataclass(frozen=True)
class Trap:
    """A combination that is known to fail.

    Attributes:
        what (str): What was found, and what it breaks.
        remedy (str): What to do.
    """

    what: str
    remedy: str


def installed_versions() -> dict:
    """Version of each package of interest, such as ``2.1.0`` or, of another distribution, ``2.3.6 (onedl-mmcv)``.

    Packages that are missing are left out.
    """
    versions = {}
    for name, (distributions, module) in PACKAGES.items():
        version = _distribution_version(name, distributions) or _module_version(module)
        if version:
            versions[name] = version
    return versions


def _distribution_version(name: str, distributions: tuple) -> Optional[str]:
    for distribution in distributions:
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return version if distribution == name else f'{version} ({distribution})'
    return None


def _package_folder(module: str) -> Optional[Path]:
    """The folder of an installed package; None without one, or if it is just a folder of that name."""
    spec = util.find_spec(module)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _module_version(module: str) -> Optional[str]:
    """``__version__`` of a package without metadata, such as a source tree on the path; None if there is none."""
    if _package_folder(module) is None:
        return None
    try:
        return getattr(importlib.import_module(module), '__version__', None)
    except Exception:  # what breaks an import is for the traps to say
        return None


def release(version: str) -> tuple:
    """``(2, 11)`` for ``2.11.0+cu130``."""
    return tuple(int(number) for number in re.findall(r'\d+', version)[:2])


def torchvision_for(versions: dict) -> tuple:
    """The release of torchvision that is made for the installed torch: 0.26 for 2.11, 0.29 for 2.14 and later."""
    return 0, min(release(versions['torch'])[1] + 15, 29)


def torchvision_fits(versions: dict) -> bool:
    """Whether torchvision, if there is one, belongs to the installed torch; from 0.29 on it serves later ones too."""
    found, wanted = release(versions.get('torchvision', '')), torchvision_for(versions)
    return found in ((), wanted) or wanted == (0, 29) < found


def find_traps(
    versions: dict,
    has_pkg_resources: bool,
    ops: mmcv_ops.State,
    has_mim_files: bool,
    loads_checkpoints: bool,
    mmcv_distributions: tuple = (),
) -> list:
    """Compare what is installed with the combinations that are known to fail.

    Args:
        versions (dict): Version by package name, without the packages that are missing.
        has_pkg_resources (bool): Whether ``pkg_resources`` can be imported.
        ops (mmcv_ops.State): What ``mmcv.ops`` gets.
        has_mim_files (bool): Whether the package holds the files that mim looks for.
        loads_checkpoints (bool): Whether torch's safe loading accepts what mmengine saves.
        mmcv_distributions (tuple[str, ...]): The installed distributions that provide mmcv.

    Returns:
        list[Trap]: What was found, worst first.
    """
    traps = []

    def at_least(name, *number):
        return name in versions and release(versions[name]) >= number

    def is_original(name):  # not one of the maintained forks
        return name in versions and 'onedl' not in versions[name]

    if at_least('mmpretrain', 0) and at_least('transformers', 5):
        traps.append(
            Trap(
                f'mmpretrain {versions["mmpretrain"]} breaks at import beside transformers {versions["transformers"]}',
                "pip install 'transformers<5', or uninstall transformers",
            )
        )
    if is_original('mmengine') and not has_pkg_resources:
        traps.append(
            Trap(
                'mmengine imports pkg_resources, which setuptools 82 dropped '
                f'(installed: {versions.get("setuptools", "none")})',
                "pip install 'setuptools<82'",
            )
        )
    if 'mmcv' in versions and ops.kind == 'broken':
        traps.append(
            Trap(
                f'the ops of mmcv {versions["mmcv"]} do not load: {ops.reason}',
                'build mmcv against this torch, or take the stand-in: pip uninstall -y mmcv mmcv-lite; '
                f"pip install 'mmcv-lite==2.1.0'; {PLACE}",
            )
        )
    if 'mmcv' in versions and ops.kind == 'none':
        traps.append(
            Trap(
                f'mmcv {versions["mmcv"]} has no ops ({ops.reason}), which detectors and segmentors need',
                f'unset MMVMAMBA_MMCV_OPS; {PLACE}, or compile them: {COMPILE}',
            )
        )
    if ops.kind == 'stand-in' and not ops.placed:
        traps.append(
            Trap(
                "the stand-in for mmcv's ops is not in mmcv's folder: commands that import mmcv.ops before mmvmamba, "
                'such as mim test mmdet, fail',
                PLACE,
            )
        )
    if len(mmcv_distributions) > 1:
        traps.append(
            Trap(
                f'{" and ".join(mmcv_distributions)} write into one folder; what is imported is a mixture',
                f'pip uninstall -y {" ".join(mmcv_distributions)}; then install one of them again',
            )
        )
    limited = [name for name in ('mmdet', 'mmsegmentation', 'mmpretrain') if is_original(name)]
    if at_least('mmcv', 2, 2) and limited:
        traps.append(
            Trap(
                f'mmcv {versions["mmcv"]} is newer than {", ".join(limited)} accept at import (below 2.2)',
                f"pip uninstall -y mmcv mmcv-lite; pip install 'mmcv-lite==2.1.0'; {PLACE}, or use the maintained "
                'forks (onedl-*)',
            )
        )
    codebases = [name for name in ('mmdet', 'mmsegmentation', 'mmpretrain') if name in versions]
    if 'mmcv' not in versions and codebases:
        traps.append(
            Trap(
                f'mmcv is not installed, which {", ".join(codebases)} need',
                f"pip install 'mmcv-lite==2.1.0'; {PLACE}",
            )
        )
    if at_least('python', 3, 14) and is_original('mmengine'):
        traps.append(
            Trap(
                f'mmengine {versions["mmengine"]} uses pkgutil.find_loader, which Python 3.14 dropped',
                'take Python 3.10 to 3.13',
            )
        )
    if at_least('imgaug', 0) and at_least('numpy', 2):
        traps.append(
            Trap(
                f'imgaug {versions["imgaug"]} breaks at import beside numpy {versions["numpy"]}',
                "pip uninstall -y imgaug; pip install imaug, its successor (or 'numpy<2')",
            )
        )
    torch_build, vision_build = (versions.get(name, '').partition('+')[2] for name in ('torch', 'torchvision'))
    if torch_build == 'cpu' and 'torchvision' in versions and vision_build != 'cpu':
        traps.append(
            Trap(
                f'torchvision {versions["torchvision"]} is a CUDA build and does not load on torch {versions["torch"]}',
                'install both from the same index: the CUDA build of torch runs on CPU too',
            )
        )
    elif at_least('torch', 2) and not torchvision_fits(versions):
        wanted = '.'.join(map(str, torchvision_for(versions)))
        traps.append(
            Trap(
                f'torchvision {versions["torchvision"]} does not belong to torch {versions["torch"]}',
                f"pip install 'torchvision=={wanted}.*'",
            )
        )
    if not loads_checkpoints:
        traps.append(
            Trap(
                f'torch {versions["torch"]} refuses checkpoints of mmengine {versions.get("mmengine", "0.10")} '
                '("Weights only load failed ... HistoryBuffer"): --resume and test fail',
                'import mmvmamba before loading (a config that names it does); nothing may take HistoryBuffer off '
                "torch's list of safe classes again",
            )
        )
    if not has_mim_files:
        traps.append(
            Trap(
                'mim will not find the configs and tools: the package has no .mim folder',
                'install it again: pip install --no-build-isolation -e . (or .)',
            )
        )
    return traps


def detect_traps() -> list:
    """:func:`find_traps` of this installation."""
    return find_traps(
        {**installed_versions(), 'python': platform.python_version()},
        util.find_spec('pkg_resources') is not None,
        mmcv_ops.state(),
        (Path(__file__).parent / '.mim').exists(),
        release(torch.__version__) < SAFE_LOADING or allows_history_buffer(),
        tuple(name for name in PACKAGES['mmcv'][0] if _distribution_version(name, (name,))),
    )


def find_broken_names() -> list:
    """A trap for each name of other projects that is installed and does not load."""
    return [
        Trap(
            f'{row.name} does not load: {row.reason.partition(";")[0]}',
            f'build it against this torch, or run scripts by python -m mmvmamba.compat --replace {row.name} SCRIPT',
        )
        for row in compat.table()
        if row.kind == 'broken'
    ]


def allows_history_buffer() -> bool:
    """Whether torch's safe loading accepts the class that every mmengine checkpoint holds."""
    return any(getattr(entry, '__name__', '') == 'HistoryBuffer' for entry in torch.serialization.get_safe_globals())


def time_scan(backend: str, device: str) -> tuple:
    """Milliseconds of a small selective scan, forward and backward, and the error of its output.

    Returns:
        tuple[float, float]: Best of five runs, and the relative error against float64.
    """
    batch, groups, channels, length = TIMED_SHAPE
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, groups * channels, length)] * 2 + [(groups * channels, 1)] + [(batch, groups, 1, length)] * 2
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    values[2] = -values[2].exp()
    u, delta, A, B, C = (value.to(device).requires_grad_() for value in values)
    times = []
    for _ in range(6):  # the first compiles and warms up
        start = time.perf_counter()
        out = selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)
        out.sum().backward()
        if device == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    u, delta, A, B, C = (value.double() for value in values)
    truth = selective_scan(u, delta, A, B, C, delta_softplus=True, backend='naive')
    error = (out.detach().cpu().double() - truth).norm() / truth.norm()
    return min(times[1:]) * 1e3, error.item()


def report_backends() -> None:
    """Print each backend with its reason, and how fast and exact it is."""
    print('op backends (auto takes the fastest; MMVMAMBA_BACKEND or use_backend() choose)')
    for status in backend_report():
        line = f'  {status.name:8}{"yes" if status.available else "no":5}{status.reason}'
        if status.available:
            device = 'cpu' if 'cuda' not in status.devices else 'cuda'
            try:
                milliseconds, error = time_scan(status.name, device)
                line += f'; selective_scan on {device}: {milliseconds:.2f} ms, error {error:.0e}'
            except Exception as error:  # a broken backend is what the report is for
                line += f'; selective_scan on {device} FAILED: {type(error).__name__}: {error}'
        print(line, flush=True)


def main() -> int:
    """Print the report; returns the exit code."""
    print(f'python {platform.python_version()}, {platform.system()} {platform.machine()}')
    print(', '.join(f'{name} {version}' for name, version in installed_versions().items()))
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        print(f'GPUs: {", ".join(devices)}; CUDA {torch.version.cuda}')
    else:
        print(f'GPUs: none visible to torch (built for CUDA {torch.version.cuda})')
    ops = mmcv_ops.state()
    print(f'mmcv ops: {ops.kind} ({ops.reason})')
    report_backends()
    print('compiled names of other projects (python -m mmvmamba.compat provides those that are missing)')
    print(compat.format_table(compat.table()))
    if release(torch.__version__) >= SAFE_LOADING and allows_history_buffer():
        print(f'mended at import: torch {torch.__version__} loads the checkpoints of mmengine, which it would refuse')
    traps = detect_traps() + find_broken_names()
    print('known traps' if traps else 'known traps: none found')
    for trap in traps:
        print(f'  {trap.what}\n    remedy: {trap.remedy}')
    return 1 if traps else 0


if __name__ == '__main__':
    sys.exit(main())

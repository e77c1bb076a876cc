"""Every CUDA source compiles to PTX for the GPU architectures that the docs name, not just for the one at hand."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

CSRC = Path(__file__).resolve().parents[2] / 'ops/csrc'
ARCHES = (80, 89, 90, 120)
SOURCES = sorted(path.relative_to(CSRC) for path in CSRC.rglob('*.cu'))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('nvcc') is None, reason='needs nvcc')
@pytest.mark.parametrize('source', SOURCES, ids=str)
def test_compiles_to_ptx_for_every_arch(source, tmp_path):
    include = Path(torch.__file__).parent / 'include'
    packaged = include.parents[1].glob('nvidia/*/include')
    includes = [CSRC, include, include / 'torch/csrc/api/include', *packaged]
    flags = [*COMMON_NVCC_FLAGS, '-std=c++20', '-w', '--use_fast_math', '-DMMVMAMBA_WITH_CUDA']
    flags += [f'-gencode=arch=compute_{arch},code=compute_{arch}' for arch in ARCHES]
    target = tmp_path / 'kernels.fatbin'
    command = ['nvcc', '-fatbin', *flags, *(f'-I{path}' for path in includes), str(CSRC / source), '-o', str(target)]
    subprocess.run(command, check=True)
    assert target.stat().st_size > 0

"""What stands once in C++ and once in Python is the same; the CPU kernels need no torch."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mmvmamba.ops.cross_scan.interface import NUM_ROUTES, SCAN_MODES
from mmvmamba.ops.cross_scan.routes import ROUTES

CSRC = Path(__file__).resolve().parents[2] / 'ops/csrc'


def test_routes_are_those_of_cpp():
    table = re.findall(r'{"(\w+)", {0b([01]{4}), 0b([01]{4})}}', (CSRC / 'common/routes.h').read_text())
    # the lowest bit is the first route
    in_cpp = {
        name: tuple((c == '1', r == '1') for c, r in zip(column[::-1], reverse[::-1]))
        for name, column, reverse in table
    }
    assert in_cpp == ROUTES and list(in_cpp) == list(ROUTES) == list(SCAN_MODES)
    assert {len(routes) for routes in ROUTES.values()} == {NUM_ROUTES}


def coefficients(name: str) -> tuple:
    text = (CSRC / 'common/softplus_coefficients.h').read_text()
    return tuple(float(c) for c in re.search(name + r'\[\] = {([^}]*)}', text)[1].split(','))


def test_polynomials_of_softplus_are_those_of_cpp():
    softplus = pytest.importorskip('mmvmamba.ops.triton_softplus', exc_type=ImportError)
    assert coefficients('kLog1pFloat') == softplus.LOG1P_FLOAT
    assert coefficients('kLog1pHalf') == softplus.LOG1P_HALF


@pytest.mark.parametrize(('name', 'error'), [('kLog1pFloat', 2e-7), ('kLog1pHalf', 6e-5)])
@pytest.mark.parametrize('scale', [1.0, 1 / np.log(2)], ids=['natural', 'base_two'])
def test_polynomials_of_softplus_are_accurate(name, error, scale):
    """In float32 and with fused multiply-adds, as the kernels compute them."""
    z = np.concatenate([np.linspace(1e-6, 1, 20001), 2.0 ** -np.arange(100)]).astype(np.float32)
    first, *rest = (np.float32(scale * c) for c in coefficients(name))
    ratio = np.full_like(z, first)
    for c in rest:
        ratio = (ratio.astype(np.float64) * z + c).astype(np.float32)
    z = z.astype(np.float64)
    assert np.abs(ratio / (scale * np.log1p(z) / z) - 1).max() < error


@pytest.mark.parametrize('source', ['ss2d/cpu_tile.cpp', 'selective_scan/cpu_chunk.cpp'])
def test_cpu_kernels_need_no_torch(source):
    compiler = shutil.which('c++')
    if compiler is None:
        pytest.skip('no C++ compiler')
    command = [compiler, '-fsyntax-only', '-std=c++17', f'-I{CSRC}', str(CSRC / source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

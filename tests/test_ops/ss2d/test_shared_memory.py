"""Which kernels that want much shared memory launch on which GPUs, with which tiles, from the kernels' own sizes."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmvmamba.ops.extension import load_extension
from mmvmamba.ops.registration import CONSTANTS
from mmvmamba.ops.ss2d.registration import cuda_columns
from tests.test_ops.ss2d.emulation import size_of

KIB = 1024
# shared memory a block may ask for, and of a processor (CUDA C++ Programming Guide, compute capabilities)
GPUS = {'8.0': (163, 164), '8.6': (99, 100), '8.9': (99, 100), '9.0': (227, 228), '10.0': (227, 228), '12.0': (99, 100)}
CHANNELS = (192, 384, 768, 1536, 2048)  # of the stages of vanilla T, and of B's last

needs_compiler = pytest.mark.skipif(
    shutil.which('c++') is None or sys.platform != 'linux', reason='needs a C++ compiler and ucontext'
)
needs_nvcc = pytest.mark.skipif(shutil.which('nvcc') is None, reason='needs nvcc')


@needs_compiler
@pytest.mark.skipif(bool(load_extension()), reason=load_extension() or '-')
def test_python_knows_the_columns_and_the_segment():
    for rank in (1, 6, 8, 9, 24, 70):
        assert [cuda_columns(rank, n) for n in range(2, 17)] == [size_of(0, rank, n) for n in range(2, 17)]
    assert CONSTANTS['ss2d_scan.cuda.states.segment'] == [size_of(4)]


@needs_compiler
@pytest.mark.parametrize('gpu', GPUS)
def test_every_kernel_for_several_states_launches(gpu):
    block = GPUS[gpu][0] * KIB
    for states in (2, 4, 8, 16):
        for element in (2, 4):
            for output in {element, 4}:  # two warps; of half precision 10 and more fit a processor
                assert size_of(1, states, element, output) <= block / (5 if element == output == 2 else 3)
            for channels in CHANNELS:
                taken = size_of(3, states, element, channels // 32, block)
                assert 1 <= taken <= 6
                assert size_of(2, states, element, taken) <= block


@needs_compiler
@pytest.mark.parametrize('gpu, groups', {'8.0': 4, '8.6': 2, '8.9': 2, '9.0': 6, '10.0': 6, '12.0': 2}.items())
def test_groups_of_a_backward_block_of_16_states(gpu, groups):
    """Of 12 groups, 384 channels, in half precision."""
    block = GPUS[gpu][0] * KIB
    # evenly over the blocks, as many as there need be
    expected = -(-12 // -(-12 // groups))
    assert size_of(3, 16, 2, 12, block) == expected
    assert size_of(2, 16, 2, groups) <= block < size_of(2, 16, 2, groups + 1)


SOURCE = """
#include "fused/mlp/backward.cuh"
#include "fused/mlp/product.cuh"
#include "ss2d/backward.cuh"
#include "ss2d/forward.cuh"

using namespace mmvmamba::ss2d;

extern "C" int bytes_of(int half, int rank, int warps, int backward, int image, int columns) {
  Args args{};
  args.projection_columns = columns;
  args.chaining = image ? Chain::kNone : Chain::kLookBack;
  const auto size = [&](auto type) {
    using T = decltype(type);
    return backward ? Backward<T>::shared_bytes(rank, warps, args) : Forward<T>::shared_bytes(rank, warps, args);
  };
  return half ? size(__half()) : size(float());
}
namespace product = mmvmamba::product;
extern "C" int mlp_bytes(int depth, int backward) {
  if (depth == 96) return backward ? product::BackwardMemory<96, 128>::kBytes : product::kSharedBytes<96>;
  if (depth == 128) return backward ? product::BackwardMemory<128, 64>::kBytes : product::kSharedBytes<128>;
  return backward ? product::BackwardMemory<192, 64>::kBytes : product::kSharedBytes<192>;
}
extern "C" int most_warps(int rank) { return max_warps(rank); }
"""


@pytest.fixture(scope='module')
def one_state(tmp_path_factory):
    """The sizes of the kernels for one state, of their own headers, which only nvcc reads."""
    folder = tmp_path_factory.mktemp('sizes')
    (folder / 'sizes.cu').write_text(SOURCE)
    root = Path(torch.__file__).parent
    includes = [
        Path(__file__).resolve().parents[3] / 'ops/csrc',
        root / 'include',
        *root.parent.glob('nvidia/*/include'),
    ]
    flags = ['-std=c++20', '-O0', '-w', '-shared', '-Xcompiler=-fPIC', '-arch=sm_90', '--expt-relaxed-constexpr']
    command = ['nvcc', *flags, *(f'-I{path}' for path in includes), 'sizes.cu', '-o', 'sizes.so']
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / 'sizes.so'))


@needs_nvcc
@pytest.mark.parametrize('gpu', GPUS)
def test_every_kernel_for_one_state_launches(gpu, one_state):
    """As ``Problem::choose_chain`` of cuda.cu asks: as many segments a block as fit, and one does."""
    block = GPUS[gpu][0] * KIB
    tiles = {}
    for half in (True, False):
        for dt_rank in (3, 6, 8, 12, 16, 24, 48, 64):
            rank = 6 if dt_rank <= 6 else 12 if dt_rank <= 12 else 0
            for backward in (False, True):
                sizes = [
                    one_state.bytes_of(half, rank, warps, backward, False, cuda_columns(dt_rank))
                    for warps in range(1, one_state.most_warps(rank) + 1)
                ]
                fitting = sum(size <= block for size in sizes)
                assert sizes == sorted(sizes) and fitting >= 1
                tiles[half, dt_rank, backward] = fitting
    if block >= 163 * KIB:
        assert all(warps >= 7 for (half, _, _), warps in tiles.items() if half)
    # the kernels of VMamba's s1l8 models, on GPUs of 99 KiB
    assert min(tiles[True, rank, backward] for rank in (6, 12, 24, 48) for backward in (False, True)) >= 4


@needs_nvcc
@pytest.mark.parametrize('gpu', GPUS)
def test_mlp_kernels_launch_or_leave_it_to_products(gpu, one_state):
    """GPUs of 99 KiB take none of them, as ``few_channels`` of mlp/cuda.cu finds; all others each."""
    largest = [max(one_state.mlp_bytes(depth, backward) for backward in (0, 1)) for depth in (96, 128, 192)]
    assert [size <= GPUS[gpu][0] * KIB for size in largest] == [GPUS[gpu][0] > 99] * 3

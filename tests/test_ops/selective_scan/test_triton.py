"""The Triton kernels at small sizes on CPU, run by Triton's interpreter in a process of its own."""

import importlib.util
import mmap
from pathlib import Path

import pytest
import torch

from tests.test_ops.scan_inputs import NAMES, assert_scan_close, make_scan_inputs, relative_error, run_truth
from tests.test_ops.selective_scan.test_selective_scan import strided
from tests.test_ops.triton_interpreter import INTERPRETED, patch_interpreter, run_interpreted


@pytest.mark.skipif(INTERPRETED, reason='this is the process that the interpreter runs in')
@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='triton is not installed')
def test_in_a_process_with_the_interpreter():
    """With those of cross_scan, to start it once."""
    run_interpreted(__file__, str(Path(__file__).parents[1] / 'cross_scan/test_triton.py'))


if INTERPRETED:
    from mmvmamba.ops.selective_scan import triton as scan_triton

    patch_interpreter()

    @pytest.mark.parametrize(
        'd_state, length, dtype, options',
        [
            (1, 7, torch.float32, {}),
            (1, 300, torch.float32, {}),
            (1, 49, torch.float16, dict(groups=1, channels=11)),
            (3, 40, torch.float32, {}),
            (2, 257, torch.float16, {}),
            (1, 20, torch.float32, dict(optional=False)),
        ],
        ids=str,
    )
    def test_scan(d_state, length, dtype, options):
        inputs = make_scan_inputs(batch=1, d_state=d_state, length=length, dtype=dtype, **options)
        softplus = options.get('optional', True)
        if not softplus:
            inputs['delta'] = inputs['delta'].abs()
        dout = torch.randn_like(inputs['u'])
        out, carries = scan_triton.selective_scan_fwd(*inputs.values(), softplus, dtype)
        grads = scan_triton.selective_scan_bwd(dout, *inputs.values(), carries, softplus)
        result = dict(out=out, last_state=carries[:, :, -1], **{'d' + n: g for n, g in zip(NAMES, grads) if g.numel()})
        assert_scan_close(result, run_truth(inputs, dout, delta_softplus=softplus), dtype)

    def test_scan_of_strided_arguments():
        inputs = make_scan_inputs(batch=1, length=20)
        dout = torch.randn_like(inputs['u'])
        views = [strided(t) for t in inputs.values()]
        out, carries = scan_triton.selective_scan_fwd(*views, True, torch.float32)
        grads = scan_triton.selective_scan_bwd(strided(dout), *views, carries, True)
        result = dict(out=out, last_state=carries[:, :, -1], **{'d' + n: g for n, g in zip(NAMES, grads)})
        assert_scan_close(result, run_truth(inputs, dout), torch.float32)

    def test_gradients_of_b_and_c_more_than_2_to_the_32_elements_apart(tmp_path):
        """One program of a batch whose partial sums have as many; they lie in a file of holes."""
        length, pairs = 16, 2**28 + 1
        inputs = make_scan_inputs(batch=1, groups=1, channels=2, length=length)
        dout = torch.randn_like(inputs['u'])
        _, carries = scan_triton.selective_scan_fwd(*inputs.values(), True, torch.float32)
        du, ddelta, flows, dA, dD, dbias = (torch.zeros(2, n) for n in (length, length, 1, 1, 1, 1))
        with open(tmp_path / 'sums', 'w+b') as file:
            file.truncate(4 * (pairs + 1) * length)
            memory = mmap.mmap(file.fileno(), 0)
        partial = torch.frombuffer(memory, dtype=torch.float32, count=length)  # the kernel writes beyond it
        scan_triton._backward[(1, 1)](
            dout, *inputs.values(), carries, flows, du, ddelta, dA, dD, dbias, partial,
            pairs, 1, 2, 1, length, 1,
            HAS_D=True, HAS_BIAS=True, SOFTPLUS=True, SINGLE=True, TURNS=1, BLOCK_D=2, BLOCK_L=length,
        )  # fmt: skip
        dC = torch.frombuffer(memory, dtype=torch.float32, count=length, offset=4 * pairs * length)
        truth = run_truth(inputs, dout)
        for value, name in ((partial, 'dB'), (dC, 'dC')):
            assert relative_error(value, truth[name].flatten()) < 5e-5, name

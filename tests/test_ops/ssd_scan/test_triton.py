"""The Triton kernels of the Mamba-2 scan at small sizes on CPU, run by Triton's interpreter in a process of its own."""

import importlib.util

import pytest
import torch

from tests.test_ops.ssd_inputs import NAMES, assert_ssd_close, draw_gradients, make_ssd_inputs, run_truth
from tests.test_ops.triton_interpreter import INTERPRETED, patch_interpreter, run_interpreted


@pytest.mark.skipif(INTERPRETED, reason='this is the process that the interpreter runs in')
@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='triton is not installed')
def test_in_a_process_with_the_interpreter():
    run_interpreted(__file__)


if INTERPRETED:
    from mmvmamba.ops import SCAN_MODES
    from mmvmamba.ops.ssd_scan import triton as ssd_triton

    patch_interpreter()
    OPS = torch.ops.mmvmamba
    # products of 16-bit operands; the interpreter cuts bfloat16 where a GPU rounds
    LIMITS = {torch.float16: (2e-3, 2e-3), torch.bfloat16: (2e-2, 2e-2), torch.float32: (5e-6, 5e-5)}

    def run(inputs, grads, size=None, mode=-1, float_output=False):
        """Output, last state and gradients by the registered op."""
        leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in inputs.items()}
        out, last = OPS.ssd_scan_triton(*leaves.values(), True, float_output, True, *(size or (0, 0)), mode)
        torch.autograd.backward((out, last), grads)
        result = dict(out=out.detach(), last_state=last.detach())
        return {**result, **{f'd{name}': leaf.grad for name, leaf in leaves.items() if leaf is not None}}

    @pytest.mark.parametrize('dtype', LIMITS, ids=str)
    @pytest.mark.parametrize(
        'options',
        [
            dict(length=70, heads=6, channels=16, groups=2, d_state=16),
            dict(length=37, heads=3, channels=5, groups=1, d_state=3, optional=False),
        ],
        ids=str,
    )
    def test_scan(options, dtype):
        inputs = make_ssd_inputs(batch=1, dtype=dtype, **options)
        grads = draw_gradients(inputs)
        assert_ssd_close(run(inputs, grads), run_truth(inputs, *grads), *LIMITS[dtype])

    @pytest.mark.parametrize('d_state, channels', [(64, 32), (128, 64)])
    def test_large_states(d_state, channels):
        inputs = make_ssd_inputs(batch=1, length=33, heads=2, channels=channels, groups=1, d_state=d_state)
        grads = draw_gradients(inputs)
        assert_ssd_close(run(inputs, grads), run_truth(inputs, *grads))

    @pytest.mark.parametrize('mode', range(3), ids=SCAN_MODES[:3])
    def test_routes(mode):
        inputs = make_ssd_inputs(batch=1, length=77, heads=8, channels=4, groups=4, routes=4, optional=mode == 0)
        grads = draw_gradients(inputs)
        truth = run_truth(inputs, *grads, size=(7, 11), scan_mode=SCAN_MODES[mode])
        assert_ssd_close(run(inputs, grads, (7, 11), mode), truth)

    def test_shared_heads_and_views(monkeypatch):
        """Several programs share a group's heads, and their parts of dB and dC are added; arguments are views."""
        monkeypatch.setattr(ssd_triton, 'PROGRAMS', 6)
        inputs = make_ssd_inputs(batch=1, length=40, heads=5, channels=4, groups=1, d_state=4)
        grads = draw_gradients(inputs)
        rows = torch.cat([inputs['dt'], inputs['B'].flatten(2), inputs['C'].flatten(2)], dim=2)
        dt, B, C = rows.split([5, 4, 4], dim=2)
        views = dict(inputs, dt=dt, B=B.unflatten(2, (1, 4)), C=C.unflatten(2, (1, 4)))
        views['x'] = inputs['x'].transpose(1, 3).contiguous().transpose(1, 3)
        out, last = ssd_triton.ssd_scan(*views.values(), True, False, True, 0, 0, -1)
        dout = grads[0][:, :1].expand_as(out)
        results = ssd_triton.ssd_scan_backward(dout, grads[1], *views.values(), True, 0, 0, -1)
        result = dict(out=out, last_state=last, **{f'd{name}': grad for name, grad in zip(NAMES, results)})
        assert_ssd_close(result, run_truth(inputs, dout, grads[1]))

    @pytest.mark.parametrize('which', [0, 1], ids=['output', 'state'])
    def test_one_gradient_alone(which):
        inputs = make_ssd_inputs(batch=1, length=34, heads=2, groups=1)
        leaves = [value.clone().requires_grad_() for value in inputs.values()]
        results = OPS.ssd_scan_triton(*leaves, True, False, True, 0, 0, -1)
        grads = draw_gradients(inputs)
        found = torch.autograd.grad(results[which], leaves, grads[which], allow_unused=True)
        alone = [grad if i == which else torch.zeros_like(grad) for i, grad in enumerate(grads)]
        truth = run_truth(inputs, *alone)
        for name, grad in zip(NAMES, found):
            expected = truth[f'd{name}']
            assert (grad - expected).norm() <= 5e-5 * expected.norm(), name

    def test_float_output_of_half_inputs():
        inputs = make_ssd_inputs(batch=1, length=12, heads=8, channels=4, groups=4, routes=4, dtype=torch.float16)
        grads = draw_gradients(inputs)
        result = run(inputs, (grads[0].float(), grads[1]), (3, 4), 0, float_output=True)
        assert result['out'].dtype == torch.float32 and result['dx'].dtype == torch.float16
        assert_ssd_close(result, run_truth(inputs, *grads, size=(3, 4)), *LIMITS[torch.float16])

    def test_opcheck_and_what_no_program_holds():
        inputs = make_ssd_inputs(batch=1, length=9, heads=2, groups=1, d_state=3)
        values = [value.requires_grad_() for value in inputs.values()]
        checks = ('test_schema', 'test_autograd_registration', 'test_faketensor')
        torch.library.opcheck(OPS.ssd_scan_triton.default, (*values, True, False, True, 0, 0, -1), test_utils=checks)
        large = make_ssd_inputs(batch=1, length=9, heads=1, channels=65, groups=1)
        grads = draw_gradients(large)
        assert_ssd_close(run(large, grads), run_truth(large, *grads))

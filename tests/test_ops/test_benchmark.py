"""The pure-PyTorch formulations that the benchmark compares with compute the same scan."""

import importlib
from pathlib import Path

import pytest
import torch

from mmvmamba.ops import selective_scan
from tests.test_ops.scan_inputs import make_scan_inputs, relative_error


@pytest.mark.parametrize('length', [1, 55, 56, 57, 300])
@pytest.mark.parametrize('formulation', ['chunked', 'log_step'])
def test_torch_formulations(formulation, length, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / 'tools/benchmark')
    torch_scan = importlib.import_module('torch_scan')
    results = []
    for scan in (
        lambda **inputs: torch_scan.selective_scan(**inputs, formulation=formulation),
        lambda **inputs: selective_scan(**inputs, delta_softplus=True, backend='naive'),
    ):
        leaves = {name: value.requires_grad_() for name, value in make_scan_inputs(length=length).items()}
        out = scan(**leaves)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), list(leaves.values()))])
    for value, expected in zip(*results):
        assert relative_error(value, expected) < 5e-5 or torch.equal(value, expected)

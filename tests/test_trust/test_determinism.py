"""With deterministic settings two runs give the same bits, on CPU and on the GPU."""

import pytest
import torch

from mmvmamba.models import VSSMBackbone

DEVICES = [
    'cpu',
    pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU is visible to torch')),
]


@pytest.fixture(autouse=True)
def _deterministic():
    """As ``randomness=dict(seed=0, deterministic=True)`` sets it; cuBLAS asks for a variable, see tests/conftest.py."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def train(device, arch, dtype, steps=3):
    """Parameters after a few steps of training with stochastic depth."""
    torch.manual_seed(0)
    model = VSSMBackbone(dict(arch, dims=16, depths=(1, 1)), out_indices=(0, 1), drop_path_rate=0.3).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            outs = model(torch.rand(3, 3, 33, 45).to(device))
        sum(out.float().square().mean() for out in outs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [value.detach().cpu() for value in model.state_dict().values()]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    'arch', [dict(), dict(d_state=4, gate='silu'), dict(scan_mode='cascade2d'), dict(norm_layer='bn')], ids=str
)
def test_two_runs_end_with_the_same_bits(device, dtype, arch):
    first = train(device, arch, dtype)
    torch.rand(100)  # another history
    second = train(device, arch, dtype)
    assert all(torch.equal(one, two) for one, two in zip(first, second))
    assert all(value.isfinite().all() for value in first)

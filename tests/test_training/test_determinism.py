"""With deterministic settings two runs give the same bits, on CPU and on the GPU."""

import pytest
import torch

from mmvmamba.models import VSSMBackbone
from tests.test_tools.conftest import ROOT, run, user_folder  # noqa: F401  (fixtures)
from tests.test_tools.test_launch import DEMO
from tests.test_tools.test_train_test import QUICK, SMALL_CLASSES

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


# the documented settings
CONFIG = f"""
_base_ = ['{ROOT / DEMO['mmpretrain']}']
custom_hooks = [dict(type='mmvmamba.ExactResumeHook')]
randomness = dict(seed=0, deterministic=True)
train_cfg = dict(max_epochs=2)
default_hooks = dict(checkpoint=dict(interval=2))
param_scheduler = [dict(type='LinearLR', start_factor=0.04, end=2, convert_to_iter_based=True)]
"""


def leaves(content, name=''):
    """What nested containers hold, by its place."""
    if isinstance(content, (dict, list, tuple)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return {place: leaf for key, item in items for place, leaf in leaves(item, f'{name}/{key}').items()}
    return {name: content}


@pytest.mark.slow
@pytest.mark.parametrize('device', DEVICES)
def test_two_trainings_write_the_same_bits(device, run, user_folder):  # noqa: F811
    """In processes of their own, through tools/train.py: weights, the optimizer's state and the schedule."""
    (user_folder / 'deterministic.py').write_text(CONFIG)
    hidden = {} if device == 'cuda' else dict(CUDA_VISIBLE_DEVICES='')
    checkpoints = []
    for name in ('first', 'second'):
        command = f'python {ROOT}/tools/train.py deterministic.py --work-dir {device}-{name} --no-validate'
        run(command, *QUICK, *SMALL_CLASSES, **hidden)
        path = user_folder / f'{device}-{name}/epoch_2.pth'
        checkpoints.append(torch.load(path, map_location='cpu', weights_only=True))
    first, second = ({key: file[key] for key in file.keys() - {'meta', 'message_hub'}} for file in checkpoints)
    assert {'state_dict', 'optimizer', 'param_schedulers'} == first.keys()
    first, second = leaves(first), leaves(second)
    assert first.keys() == second.keys()
    tensors = [place for place, value in first.items() if isinstance(value, torch.Tensor)]
    moments = [place for place in tensors if place.endswith(('exp_avg', 'exp_avg_sq')) and first[place].any()]
    assert len(tensors) > 100 and len(moments) > 100
    for place, value in first.items():
        same = torch.equal(value, second[place]) if place in tensors else value == second[place]
        assert same, place

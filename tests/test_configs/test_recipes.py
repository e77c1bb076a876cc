"""The recipes build, and train an iteration; what each one promises holds."""

import json
import re

import pytest
import torch

from tests.test_configs.zoo import ROOT, build, build_optimizer, load, read, synthetic_data
from tests.test_tools.conftest import place_of_its_own

FOLDER = ROOT / 'configs/recipes'
PATHS = sorted(FOLDER.glob('*.py'))
SUPERVISED = [path for path in PATHS if 'simmim' not in path.name]


def cases():
    for path in SUPERVISED:
        quick = 'os' in path.name or 'mask-rcnn' in path.name or 'custom' in path.name
        yield pytest.param(path, id=path.stem, marks=[] if quick else pytest.mark.slow)


def test_the_readme_lists_them():
    text = (FOLDER / 'README.md').read_text()
    assert {path.name for path in PATHS} == set(re.findall(r'\]\(([\w.-]+\.py)\)', text))


@pytest.mark.parametrize('path', cases())
def test_one_iteration(path):
    cfg = load(path, drop_path_rate=0.0)
    model = build(cfg).train()
    optimizer = build_optimizer(model, cfg)
    data = model.data_preprocessor(synthetic_data(cfg), training=True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    optimizer.backward(loss)
    assert loss.isfinite() and all(p.grad.abs().sum() > 0 for p in model.backbone.parameters())
    optimizer.step()
    strides = re.search(r'-os(\d+)_', path.name)
    if strides:
        x = torch.rand(1, 3, 64, 64)
        assert 64 // model.backbone(x)[-1].shape[2] == int(strides[1])
    rates = {group['lr'] for group in optimizer.optimizer.param_groups}
    decays = 'layer-decay' in path.name or 'custom' in path.name
    assert len(rates) == (16 if decays else 1)  # 14 blocks, the stem, and all above


@pytest.mark.parametrize('path', [path for path in PATHS if '384px_in1k' in path.name], ids=lambda path: path.stem)
def test_schedule_at_384(path):
    cfg = read(path)
    assert cfg.load_from == cfg.vmamba.checkpoint and 'init_cfg' not in cfg.model.backbone
    assert cfg.optim_wrapper.optimizer.lr == 2e-5 and cfg.train_cfg.max_epochs == 30
    warm, cosine = cfg.param_scheduler
    assert warm.end == cosine.begin == 5 and cosine.begin + cosine.T_max == 30 and cosine.eta_min < 2e-5
    assert next(step.scale for step in cfg.train_dataloader.dataset.pipeline if 'scale' in step) == 384
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size


def test_masked_pretraining_builds():
    model = build(read(FOLDER / 'simmim_vmamba-tiny-s1l8_8xb256-amp-100e_in1k-192px.py'))
    assert model.backbone.mask_token.shape == (1, 96, 1, 1) and model.backbone.out_indices == (3,)


@pytest.mark.slow
def test_masked_pretraining_on_digits_lowers_the_loss():
    with place_of_its_own() as (folder, run):
        config = FOLDER / 'simmim_vmamba-nano_1xb64-20e_digits-32px.py'
        options = ['--cfg-options', 'train_cfg.max_epochs=4', 'param_scheduler=None']
        run(f'python {ROOT}/tools/train.py {config} --work-dir {folder}/masked', *options)
        (log,) = (folder / 'masked').glob('2*/vis_data/scalars.json')
        losses = [json.loads(line)['loss'] for line in log.read_text().splitlines() if '"loss"' in line]
        assert losses[-1] < 0.8 * losses[0]

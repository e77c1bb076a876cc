"""Stages after the last of out_indices are not built; files and runs that have them are taken up nevertheless."""

import shutil

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmvmamba import VSSMBackbone

ARCH = dict(dims=8, depths=(1, 1, 1, 1))


def older(cls=VSSMBackbone):
    """The backbone for ``out_indices=(0, 1)`` as it was built before: all stages, two norms."""
    model = cls(ARCH)
    del model.outnorm2, model.outnorm3
    model.out_indices = (0, 1)
    return model


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr('mmvmamba.models.vssm.print_log', lambda text, **_: lines.append(text))
    return lines


def test_a_strict_load_says_in_one_line_what_it_leaves_out(log):
    old, new = older(), VSSMBackbone(ARCH, out_indices=(0, 1))
    new.load_state_dict(old.state_dict(), strict=True)
    assert len(log) == 1 and 'out_indices=(0, 1)' in log[0] and 'layers.1.downsample' in log[0]
    x = torch.randn(1, 3, 32, 32)
    for value, expected in zip(new.eval()(x), old.eval()(x)):
        assert torch.equal(value, expected)
    # inside a model, and from the backbone of a task that used all stages
    whole = nn.ModuleDict(dict(backbone=new))
    whole.load_state_dict({f'backbone.{key}': value for key, value in VSSMBackbone(ARCH).state_dict().items()})
    assert len(log) == 2


def test_other_keys_are_still_unexpected(log):
    new, state = VSSMBackbone(ARCH, out_indices=(0, 1)), older().state_dict()
    for key in ('layers.4.blocks.0.norm.weight', 'layers.0.blocks.1.norm.weight', 'outnorm4.weight'):
        with pytest.raises(RuntimeError, match=f'Unexpected key.*{key}'):
            new.load_state_dict({**state, key: torch.ones(8)})
    assert VSSMBackbone(ARCH, out_indices=(1, 3)).unused(VSSMBackbone(ARCH).state_dict()) == []


def test_a_pretrained_file_of_all_stages(tmp_path):
    full = VSSMBackbone(ARCH)
    torch.save(dict(state_dict=full.state_dict()), tmp_path / 'full.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'full.pth'))
    new = VSSMBackbone(ARCH, out_indices=(0, 1), init_cfg=init_cfg)
    new.init_weights()
    for key, value in new.state_dict().items():
        assert torch.equal(value, full.state_dict()[key])


# ---- resuming -------------------------------------------------------------------------------------------------------
class Images(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(images=torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index)))


class Model(BaseModel):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(16, 1)

    def forward(self, images, mode='tensor'):
        maps = self.backbone(images)
        return dict(loss=(self.head(maps[1].mean(dim=(2, 3))) - 1).square().mean() + maps[0].square().mean())


def train(backbone, work_dir, epochs, paramwise=False, **options):
    torch.manual_seed(0)
    paramwise_cfg = dict(norm_decay_mult=0.0) if paramwise else None
    runner = Runner(
        model=Model(backbone()),
        work_dir=str(work_dir),
        experiment_name=f'{work_dir.name}-{epochs}-{torch.seed()}',
        train_dataloader=dict(
            dataset=Images(),
            batch_size=4,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.1), paramwise_cfg=paramwise_cfg),
        randomness=dict(seed=0),
        **options,
    )
    runner.train()
    return {name: value for name, value in runner.model.state_dict().items() if name.startswith('head')} | dict(
        runner.model.backbone.state_dict()
    )


def today():
    return VSSMBackbone(ARCH, out_indices=(0, 1))


HOOK = dict(type='mmvmamba.ResumeOlderRunHook')


@pytest.mark.parametrize('paramwise', [False, True])
def test_an_older_run_goes_on_with_its_optimizer(tmp_path, paramwise):
    through = train(older, tmp_path / 'through', 2, paramwise)
    train(older, tmp_path / 'older', 1, paramwise)
    shutil.copytree(tmp_path / 'older', tmp_path / 'plain')
    resumed = train(today, tmp_path / 'older', 2, paramwise, resume=True, custom_hooks=[HOOK])
    for name, value in resumed.items():
        assert torch.equal(value, through[name]), name
    # a run of today resumes with the hook as without it
    again = train(today, tmp_path / 'older', 3, paramwise, resume=True, custom_hooks=[HOOK])
    assert again.keys() == resumed.keys() and not torch.equal(again['head.weight'], resumed['head.weight'])
    # without it torch names a size only, and the log line before it the hook
    with pytest.raises(ValueError, match='parameter group'):
        train(today, tmp_path / 'plain', 2, paramwise, resume=True)
    logs = ''.join(path.read_text() for path in (tmp_path / 'plain').glob('2*/*.log'))
    assert "custom_hooks=[dict(type='mmvmamba.ResumeOlderRunHook')]" in logs


def test_an_order_that_can_not_be_told_is_an_error(tmp_path):
    train(older, tmp_path / 'older', 1)
    file = tmp_path / 'older' / 'epoch_1.pth'
    checkpoint = torch.load(file)
    checkpoint['optimizer']['param_groups'][0]['params'].reverse()
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match='load the weights alone'):
        train(today, tmp_path / 'older', 2, resume=True, custom_hooks=[HOOK])

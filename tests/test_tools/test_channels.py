"""Images of 1, 3 and 4 channels through every tool that reads or makes some; the model says how many it takes."""

import cv2
import numpy as np
import pytest
import torch

from mmvmamba import VSSMBackbone, cli
from mmvmamba.models.archs import build_arch

from .conftest import ROOT, load_tool

TOOLS = {
    'analysis/get_flops.py': ['{config}', '--shape', '64'],
    'analysis/erf.py': [
        '--model',
        'mine',
        '{config}',
        'none',
        '--images',
        '{image}',
        '--size',
        '64',
        '--out-dir',
        '{out}',
    ],
    'analysis/attention_map.py': ['{config}', 'none', '{image}', '--out-dir', '{out}'],
    'analysis/feature_map.py': ['{config}', 'none', '{image}', '--out-dir', '{out}'],
    'analysis/robustness_resolution.py': ['--model', 'mine', '{config}', 'none', '--data', '{data}', '--sizes', '32']
    + ['--out-dir', '{out}'],
    'analysis/linear_probe.py': ['{config}', 'none', '--data', '{splits}', '--size', '32', '--workers', '0']
    + ['--out-dir', '{out}'],
    'analysis/throughput.py': [
        '--model',
        'mine',
        '{config}',
        '--precisions',
        'fp32',
        '--batch-size',
        '1',
        '--sizes',
        '64',
    ]
    + ['--modes', 'inference', '--warmup', '0', '--steps', '1', '--device', 'cpu', '--out-dir', '{out}'],
    'export/to_onnx.py': ['{config}', 'none', '--out', '{out}/model.onnx', '--check-sizes', '64x96'],
    'export/to_program.py': ['{config}', 'none', '--out', '{out}/model.pt2'],
}


@pytest.fixture(scope='module', params=[1, 4])
def channels(request):
    return request.param


@pytest.fixture(scope='module')
def files(channels, tmp_path_factory):
    """A config of a model with that many channels, and images of them."""
    folder = tmp_path_factory.mktemp('channels')
    config = folder / 'config.py'
    config.write_text(
        f"_base_ = '{ROOT}/configs/demo/vmamba-nano_1xb64_digits-32px.py'\n"
        'backbone = dict(_delete_=True, type="mmvmamba.VSSMBackbone", arch=dict(dims=8, depths=(1, 1)))\n'
        f'backbone.update(in_channels={channels}, out_indices=(1,))\n'
        'model = dict(backbone=backbone, head=dict(num_classes=2, in_channels=16))\n'
        f'data_preprocessor = dict(mean={[10.0] * channels}, std={[60.0] * channels}, to_rgb=False, num_classes=2)\n'
        'model.update(data_preprocessor=data_preprocessor)\n'
    )
    random = np.random.default_rng(0)
    for name in ('one', 'two'):
        (folder / 'data' / name).mkdir(parents=True)
        pixels = random.integers(0, 256, (64, 64, channels), dtype=np.uint8)
        cv2.imwrite(str(folder / 'data' / name / 'image.png'), pixels)
    (folder / 'splits').mkdir()
    for split in ('train', 'val'):
        (folder / 'splits' / split).symlink_to(folder / 'data')
    return folder, config


@pytest.mark.parametrize('tool', TOOLS)
def test_tool(tool, files, tmp_path, capfd):
    folder, config = files
    places = dict(config=config, image=folder / 'data/one/image.png', data=folder / 'data', out=tmp_path / 'out')
    places['splits'] = folder / 'splits'
    arguments = [word.format(**places) for word in TOOLS[tool]]
    assert load_tool(tool).main(arguments) == 0, capfd.readouterr().err


def test_what_is_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4), dtype=np.uint8)
    for channels in (1, 3, 4):
        cv2.imwrite(str(tmp_path / f'{channels}.png'), pixels[:, :, :channels])
    for channels in (1, 3):
        for wanted in (1, 3):
            image = cli.read_image(tmp_path / f'{channels}.png', 'image', channels=wanted)
            assert image.shape == (5, 4, wanted) and cli.as_rgb(image).shape == (5, 4, 3)
    assert (cli.read_image(tmp_path / '4.png', 'image', channels=4) == pixels).all()
    with pytest.raises(cli.UserError, match='has 3 channels, expected 4'):
        cli.read_image(tmp_path / '3.png', 'image', channels=4)


def test_a_keyword_beside_an_arch():
    model = VSSMBackbone('nano', in_channels=4)
    assert model.in_channels == 4 == cli.image_channels(model) and model.patch_embed[0].weight.shape[1] == 4
    assert model(torch.rand(1, 4, 64, 64))[0].shape == (1, 32, 16, 16)
    with pytest.raises(ValueError, match=r'expected images of shape \(B, 4, H, W\)'):
        model(torch.rand(1, 3, 64, 64))
    assert build_arch(dict(dims=8, depths=(1,), in_channels=2)).in_channels == 2
    for bad in (0, 2.0, True):
        with pytest.raises((TypeError, ValueError), match='in_channels'):
            VSSMBackbone('nano', in_channels=bad)
    assert cli.image_channels(torch.nn.Sequential(torch.nn.Conv2d(5, 1, 1))) == 5

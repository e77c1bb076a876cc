"""The analysis tools: what they compute against definitions, what they write, and what they refuse."""

import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from mmvmamba import VSSMBackbone, cli
from mmvmamba.analysis.receptive_field import contribution, smallest_square

from .conftest import ROOT
from .test_attention import VIT

CLASSIFIER = str(ROOT / 'configs/demo/vmamba-nano_1xb64_digits-32px.py')
DETECTOR = str(next((ROOT / 'configs/demo').glob('mask-rcnn_*.py')))


@pytest.fixture(autouse=True)
def _quiet_logging(monkeypatch):
    """A logger that an earlier test made writes to that test's captured stream, which is closed by now."""
    monkeypatch.setattr(logging, 'raiseExceptions', False)


# ---- receptive fields -----------------------------------------------------------------------------------------------
class Convolutions(nn.Module):
    """Layers of ones: the field of 3x3 convolutions is the convolution of as many boxes."""

    def __init__(self, layers):
        super().__init__()
        self.convs = nn.Sequential(*[nn.Conv2d(1, 1, 3, 1, 1, bias=False) for _ in range(layers)])
        for conv in self.convs:
            nn.init.ones_(conv.weight)

    def forward(self, x):
        return (self.convs(x),)


def test_field_of_convolutions_is_known():
    field = contribution(Convolutions(2), torch.ones(1, 1, 9, 9))
    expected = torch.zeros(9, 9, dtype=torch.float64)
    box = torch.tensor([1.0, 2, 3, 2, 1], dtype=torch.float64)
    expected[2:7, 2:7] = box[:, None] * box
    assert torch.equal(field, expected)
    # the square of side 3 holds (7 / 9)^2 = 60.5 %, that of side 2 (5 / 9)^2 = 30.9 %
    squares = [smallest_square(field, share) for share in (0.1, 0.3, 0.31, 0.6, 0.61, 1.0)]
    assert [side for side, _, _ in squares] == [1, 2, 3, 3, 4, 5]
    assert squares[0] == (1, 4, 4) and squares[3] == (3, 3, 3) and squares[-1] == (5, 2, 2)


@pytest.mark.parametrize('height, width', [(7, 12), (12, 7), (10, 10)])
def test_square_is_the_smallest_of_all(height, width):
    field = torch.rand(height, width, dtype=torch.float64) ** 8
    for share in (0.2, 0.5, 0.9, 0.99):
        side, row, column = smallest_square(field, share)
        assert field[row : row + side, column : column + side].sum() >= share * field.sum() * (1 - 1e-9)
        smaller = [
            field[i : i + side - 1, j : j + side - 1].sum() for i in range(height) for j in range(width) if side > 1
        ]
        assert all(held < share * field.sum() for held in smaller)


# ---- the command lines ----------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def folder(tmp_path_factory, filled):
    """Images, and checkpoints of the demo's classifier and of another arch."""
    from mmvmamba.cli import load_model

    folder = tmp_path_factory.mktemp('analysis')
    rng = np.random.default_rng(0)
    for label in '0123456789':
        (folder / 'images' / label).mkdir(parents=True)
        cv2.imwrite(str(folder / f'images/{label}/a.png'), rng.integers(0, 255, (40, 48, 3), dtype=np.uint8))
    model = filled(load_model(CLASSIFIER, None))
    torch.save(dict(state_dict=model.state_dict(), meta=dict(epoch=1)), folder / 'classifier.pth')
    other = VSSMBackbone('tiny-s1l8').state_dict()
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in other.items()}), folder / 'other.pth')
    return folder


@pytest.fixture(scope='module')
def vit_config(tmp_path_factory):
    """Path of a classifier's config with a small vision transformer."""
    config = tmp_path_factory.mktemp('vit') / 'vit.py'
    head = dict(type='VisionTransformerClsHead', num_classes=10, in_channels=16)
    preprocessor = dict(num_classes=10, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)
    model = dict(type='ImageClassifier', data_preprocessor=preprocessor, backbone=VIT, head=head)
    config.write_text(f"_base_ = ['mmpretrain::_base_/default_runtime.py']\nmodel = {model}\n")
    return str(config)


def arguments_of(name, folder, **changes):
    """A small valid command line of a tool."""
    values = dict(config=CLASSIFIER, checkpoint=f'{folder}/classifier.pth', image=f'{folder}/images/3/a.png', extra=[])
    values.update(changes)
    config, checkpoint, image, extra = (values[key] for key in ('config', 'checkpoint', 'image', 'extra'))
    if name == 'erf':
        start = ['--model', 'a', config, 'none', '--model', 'b', config, checkpoint, '--images', str(folder / 'images')]
        return [*start, '--num-images', '2', '--size', '64', *extra]
    if name == 'robustness_resolution':
        start = ['--model', 'a', config, checkpoint, '--data', str(folder / 'images')]
        return [*start, '--sizes', '32', '48', '--batch-size', '4', *extra]
    return [config, checkpoint, image, *extra]


PICTURES = ('erf', 'attention_map', 'feature_map', 'robustness_resolution')


@pytest.mark.parametrize('name', PICTURES)
def test_a_tool_writes_picture_and_data_and_overwrites_nothing(tool, folder, tmp_path, capsys, name):
    main, out_dir = tool(f'analysis/{name}.py').main, tmp_path / 'out'
    arguments = [*arguments_of(name, folder), '--out-dir', str(out_dir), '--device', 'cpu']
    assert main(arguments) == 0
    picture = cv2.imread(str(out_dir / f'{name}.png'))
    assert picture is not None and picture.std() > 1
    written = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    assert any(file.endswith(('.npz', '.json')) for file in written)
    capsys.readouterr()
    assert main(arguments) == 2
    assert capsys.readouterr().err.count('\n') == 1
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == written
    (out_dir / 'mine.txt').write_text('mine')
    assert main([*arguments, '--force']) == 0
    assert (out_dir / 'mine.txt').read_text() == 'mine'


def test_contents_of_the_data_files(tool, folder, tmp_path):
    assert (
        tool('analysis/attention_map.py').main(
            [
                *arguments_of('attention_map', folder),
                '--pixel',
                '47',
                '0',
                '--stage',
                '1',
                '--out-dir',
                str(tmp_path / 'a'),
            ]
        )
        == 0
    )
    data = np.load(tmp_path / 'a/attention_map.npz')
    assert data['cell'].tolist() == [0, 5] and data['CwBdtw_weights'].shape == (4, 64, 5, 6)
    np.testing.assert_allclose(data['CwBdtw_weights'].mean(axis=1), data['CwBdtw_raw'], atol=1e-6)
    np.testing.assert_allclose(data['CwBdtw_normalized_merged'].sum(), 1)
    assert tool('analysis/erf.py').main([*arguments_of('erf', folder), '--out-dir', str(tmp_path / 'e')]) == 0
    summary = json.loads((tmp_path / 'e/erf.json').read_text())
    fields = np.load(tmp_path / 'e/erf.npz')
    assert set(summary) == set(fields.files) == {'a', 'b'} and fields['a'].shape == (64, 64)
    sides = [summary['b']['side_in_pixels'][share] for share in ('20%', '50%', '99%')]
    assert sides == sorted(sides) and sides[0] >= 1 and sides[-1] <= 64
    assert (
        tool('analysis/feature_map.py').main([*arguments_of('feature_map', folder), '--out-dir', str(tmp_path / 'f')])
        == 0
    )
    maps = np.load(tmp_path / 'f/feature_map.npz')
    assert [maps[f'stage_{stage}'].shape[0] for stage in range(4)] == [32, 64, 128, 256]


def test_all_forms_beside_a_vision_transformer_and_as_matrices(tool, folder, tmp_path, vit_config):
    extra = ['--forms', 'CB', 'CwBw', 'ww', '--vit', vit_config, 'none', '--vit-layer', '1', '--matrix']
    arguments = [*arguments_of('attention_map', folder, extra=extra), '--stage', '2', '--out-dir', str(tmp_path)]
    assert tool('analysis/attention_map.py').main([*arguments, '--pixel', '40', '10']) == 0
    data, matrices = np.load(tmp_path / 'attention_map.npz'), np.load(tmp_path / 'attention_matrix.npz')
    assert data['cell'].tolist() == [0, 2] and data['vit_cell'].tolist() == [1, 5]
    assert data['vit_attention'].shape == data['vit_scores'].shape == (5, 6) and data['vit_attention'].sum() < 1
    for form in ('CB', 'CwBw', 'ww'):
        routes, merged = matrices[f'{form}_routes'], matrices[f'{form}_merged']
        assert routes.shape == (4, 9, 9)  # stride 16 of 40x48 pixels
        np.testing.assert_allclose(merged[2].reshape(3, 3), data[f'{form}_raw_merged'], rtol=1e-4, atol=1e-9)
        scaled = matrices[f'{form}_mean_scaled']
        assert scaled.min() >= 0 and scaled.max() <= 1
    for name in ('attention_map.png', 'attention_matrix.png'):
        assert cv2.imread(str(tmp_path / name)).std() > 1


@pytest.mark.parametrize(
    'name, changes, words',
    [
        ('attention_map', dict(image='absent.png'), "image 'absent.png' does not exist"),
        ('attention_map', dict(extra=['--pixel', '48', '0']), '--pixel is 48 0, outside the image'),
        ('attention_map', dict(extra=['--stage', '4']), 'stage is 4, expected one of 0, 1, 2, 3'),
        ('attention_map', dict(extra=['--block', '2', '--stage', '1']), 'block is 2, expected 0 to 0'),
        ('attention_map', dict(config='mmpretrain::resnet/resnet18_8xb32_in1k.py', checkpoint='none'), 'VSSMBackbone'),
        ('attention_map', dict(extra=['--forms', 'CB', 'BC']), '--forms is CB BC, expected different ones of CB, CBdt'),
        ('attention_map', dict(extra=['--forms', 'CB', 'CB']), '--forms is CB CB, expected different ones'),
        ('attention_map', dict(extra=['--vit-layer', '2']), '--vit-layer is 2 without --vit'),
        ('attention_map', dict(extra=['--vit', CLASSIFIER, 'none']), 'VSSMBackbone, expected a VisionTransformer'),
        ('attention_map', dict(extra=['--vit', 'VIT', 'none', '--vit-layer', '3']), 'layer is 3, expected 0 to 2'),
        ('attention_map', dict(extra=['--matrix', '--size', '512']), 'the map has 16384 pixels, expected at most 4096'),
        ('attention_map', dict(config='absent.py'), "config 'absent.py' is not a file"),
        ('attention_map', dict(config=str(ROOT / 'tests/__init__.py')), 'has default_scope None and no model'),
        ('attention_map', dict(checkpoint='absent.pth'), "checkpoint 'absent.pth' is not a file"),
        ('attention_map', dict(checkpoint=__file__), 'checkpoint'),
        ('feature_map', dict(other=True), "it fits arch 'tiny-s1l8'"),
        ('feature_map', dict(config=DETECTOR), 'does not fit'),
        ('feature_map', dict(image=__file__), 'is not an image'),
        ('feature_map', dict(image=str(ROOT / 'tests')), 'is a folder'),
        ('feature_map', dict(extra=['--size', '8']), '--size is 8'),
        (
            'feature_map',
            dict(extra=['--size', '100000000']),
            '--size is 100000000, expected one or two numbers from 32',
        ),
        ('feature_map', dict(extra=['--out-dir', f'{__file__}/new']), 'test_analysis.py/new'),
        ('feature_map', dict(extra=['--device', 'cuda:99']), "--device is 'cuda:99'"),
        ('erf', dict(extra=['--images', 'absent']), "--images 'absent' does not exist"),
        ('erf', dict(extra=['--num-images', '0']), '--num-images is 0'),
        ('erf', dict(extra=['--size', '64', '64', '64']), '--size is 64 64 64'),
        ('erf', dict(extra=['--model', 'a', CLASSIFIER, 'none']), "--model has the name 'a' 2 times"),
        ('robustness_resolution', dict(config=DETECTOR, checkpoint='none'), 'expected a classifier'),
        ('robustness_resolution', dict(extra=['--data', 'absent']), "--data 'absent'"),
        ('robustness_resolution', dict(extra=['--data', str(ROOT / 'tests')]), '--data'),
        ('robustness_resolution', dict(extra=['--sizes', '0']), '--sizes'),
    ],
)
def test_bad_input_is_one_clear_line(tool, folder, tmp_path, capfd, monkeypatch, vit_config, name, changes, words):
    monkeypatch.chdir(tmp_path)
    if changes.pop('other', False):
        changes = dict(changes, checkpoint=f'{folder}/other.pth')
    arguments = [vit_config if word == 'VIT' else word for word in arguments_of(name, folder, **changes)]
    assert tool(f'analysis/{name}.py').main(['--out-dir', 'out', *arguments]) == 2
    error = capfd.readouterr().err
    assert error.startswith('error: ') and words in error and error.count('\n') == 1, error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_not_be_written_is_found_before_the_work(tool, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('os.access', lambda path, mode: False)  # root may write everywhere
    arguments = ['--out-dir', str(tmp_path / 'new/deep'), *arguments_of('feature_map', folder)]
    assert tool('analysis/feature_map.py').main(arguments) == 2
    assert capsys.readouterr().err == f"error: --out-dir is '{tmp_path}/new/deep', but '{tmp_path}' cannot be written\n"


def test_a_folder_that_can_not_be_made_is_one_line():
    with pytest.raises(cli.UserError, match=r"'/proc/new/deep' cannot be made: No such file or directory"):
        cli.make_out_dir(Path('/proc/new/deep'))

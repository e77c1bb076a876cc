"""The digits data set: real scans, seeded, train and val from different ones, three annotations that agree."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

SMALL = ['--num-train', '6', '--num-val', '3', '--image-size', '64']


@pytest.fixture(scope='module')
def digits(tool):
    return tool('dataset_converters/digits.py')


@pytest.fixture(scope='module')
def data(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp('digits') / 'set'
    assert digits.main([*SMALL, '--out-dir', str(out)]) == 0
    return out


def hashes(folder: Path) -> dict:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def test_one_seed_gives_identical_files_and_another_does_not(digits, data, tmp_path):
    assert digits.main([*SMALL, '--out-dir', str(tmp_path / 'again')]) == 0
    assert hashes(tmp_path / 'again') == hashes(data)
    assert digits.main([*SMALL, '--seed', '1', '--out-dir', str(tmp_path / 'other')]) == 0
    assert hashes(tmp_path / 'other') != hashes(data)


def test_all_scans_are_there_once_and_none_in_both_splits(data):
    train, val = ([path.stem for path in (data / 'classification' / name).rglob('*.png')] for name in ('train', 'val'))
    assert len(train) + len(val) == len(set(train) | set(val)) == 1797
    assert 0.19 < len(val) / 1797 < 0.21
    for name in ('train', 'val'):
        assert sorted(path.name for path in (data / 'classification' / name).iterdir()) == list('0123456789')


def test_scenes_use_the_scans_of_their_split_only(digits, monkeypatch):
    scans = digits.split_scans(0)
    train, val = (set(map(int, scans[name][2])) for name in ('train', 'val'))
    assert not train & val
    for name in ('train', 'val'):
        images, labels, index = scans[name]
        reference = digits.load_digits()
        assert np.array_equal(images, reference.images[index]) and np.array_equal(labels, reference.target[index])


@pytest.mark.parametrize('name, count', [('train', 6), ('val', 3)])
def test_boxes_masks_and_semantic_maps_agree(data, name, count):
    coco = COCO(data / f'annotations/instances_{name}.json')
    assert len(coco.imgs) == count and [category['name'] for category in coco.loadCats(range(10))] == list('0123456789')
    for image in coco.imgs.values():
        picture = cv2.imread(str(data / 'scenes' / name / image['file_name']))
        semantic = cv2.imread(str(data / 'semantic' / name / image['file_name']), cv2.IMREAD_UNCHANGED)
        assert picture.shape == (64, 64, 3) and semantic.shape == (64, 64)
        expected = np.zeros((64, 64), np.uint8)
        annotations = coco.loadAnns(coco.getAnnIds(image['id']))
        assert annotations
        for annotation in annotations:
            mask = coco.annToMask(annotation).astype(bool)
            assert not expected[mask].any()  # what lies below is not in its mask
            expected[mask] = annotation['category_id'] + 1
            rows, columns = np.nonzero(mask)
            left, top, width, height = annotation['bbox']
            assert (left, top) == (columns.min(), rows.min())
            assert (width, height) == (np.ptp(columns) + 1, np.ptp(rows) + 1)
            assert annotation['area'] == mask.sum() > 0
        assert np.array_equal(semantic, expected)


def test_a_full_folder_is_kept_unless_forced(digits, tmp_path, capsys):
    (tmp_path / 'mine.txt').write_text('mine')
    assert digits.main([*SMALL, '--out-dir', str(tmp_path)]) == 2
    assert '--out-dir' in capsys.readouterr().err and (tmp_path / 'mine.txt').read_text() == 'mine'
    target = tmp_path / 'set'
    target.mkdir()
    (target / 'old.txt').write_text('old')
    assert digits.main([*SMALL, '--out-dir', str(target), '--force']) == 0
    assert not (target / 'old.txt').exists() and (target / 'scenes').is_dir()


def test_an_interrupted_run_leaves_nothing(digits, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, 'write_scenes', interrupt)
    with pytest.raises(KeyboardInterrupt):
        digits.main([*SMALL, '--out-dir', str(tmp_path / 'set')])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('option', ['--seed=-1', '--num-train=0', '--num-val=0', '--image-size=8'])
def test_bad_arguments_are_named(digits, option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        digits.main([option, '--out-dir', str(tmp_path / 'set')])
    assert option.split('=')[0] in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_annotations_are_plain_json(data):
    loaded = json.loads((data / 'annotations/instances_val.json').read_text())
    assert set(loaded) == {'images', 'annotations', 'categories'}

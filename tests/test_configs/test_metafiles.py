"""Metafiles, model index and folder READMEs agree with the configs, and mim reads them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config

from tests.test_configs.zoo import ROOT, TASKS, ablation_paths, arch_of, baseline_paths, config_paths, read

FOLDERS = (*TASKS, 'ablation')
METAFILES = {folder: yaml.safe_load((ROOT / f'configs/{folder}/metafile.yml').read_text()) for folder in FOLDERS}
NO_WEIGHTS = 'none published/.'
RELEASE = 'https://github.com/MzeroMiko/VMamba/'
ROWS = [(folder, row) for folder, metafile in METAFILES.items() for row in metafile['Models']]


def test_every_config_has_its_row_and_every_row_its_config():
    paths = [f'configs/{path.parent.name}/{path.name}' for path in config_paths() + baseline_paths() + ablation_paths()]
    rows = [row['Config'] for _, row in ROWS]
    assert sorted(rows) == sorted(paths) and len(set(rows)) == len(rows)
    for folder, row in ROWS:
        assert row['Config'] == f'configs/{folder}/{row["Name"]}.py'


def test_index_lists_the_metafiles():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert index == dict(Import=[f'configs/{folder}/metafile.yml' for folder in FOLDERS])
    names = [entry['Name'] for metafile in METAFILES.values() for entry in metafile['Collections']]
    assert len(set(names)) == len(names) == 7
    for metafile in METAFILES.values():
        for collection in metafile['Collections']:
            assert (ROOT / collection['README']).is_file()
        for row in metafile['Models']:
            (collection,) = [found for found in metafile['Collections'] if found['Name'] == row['In Collection']]
            assert ('vmamba' in row['Name']) == ('VMamba' in collection['Name'])


@pytest.mark.parametrize('folder, row', ROWS, ids=lambda value: value if isinstance(value, str) else value['Name'])
def test_row(folder, row, tables):
    cfg = read(ROOT / row['Config'])
    metadata = row['Metadata']
    schedule = cfg.train_cfg.get('max_epochs', cfg.train_cfg.get('max_iters'))
    assert metadata.get('Epochs', metadata.get('Iterations')) == schedule
    if 'custom' in row['Name'] or folder == 'ablation':
        assert row['Weights'] == NO_WEIGHTS and 'Results' not in row
        return
    if 'vmamba' not in row['Name']:
        published = metadata.get('Published')
        if published:  # figures of the published tables, such as 69M and 354G
            assert f'{metadata["Parameters"] / 1e6:.0f}M' == published['Parameters']
            # the published 354G and 496G of Swin are not what a count gives
            assert abs(metadata['FLOPs'] / 1e9 / float(published['FLOPs'].rstrip('G')) - 1) < 0.02
        assert row['Weights'] == NO_WEIGHTS and ('Results' in row) == (published is not None)
        return
    arch = arch_of(ROOT / row['Config'])
    size, family = arch.split('-')
    variant = tables['variants'][f'vanilla_vmamba_{size}' if family == 'v0' else f'vmamba_{size}_{family}']
    if folder == 'classification':
        assert metadata['Parameters'] == variant['params']
        low, high = (1.15, 1.3) if family == 'm2' else (0.999, 1.001)  # published without the scan of Mamba-2
        assert low < metadata['FLOPs'] / variant['flops_224'] < high
        assert row['Weights'] == cfg.vmamba.get('checkpoint', NO_WEIGHTS)
    else:
        # a whole model has the backbone's parameters, less the classifier, and more FLOPs than its pixels cost there
        assert metadata['Parameters'] > variant['params'] - 1_030_000
        assert metadata['FLOPs'] > 20 * variant['flops_224']
    if 'Results' in row:
        assert metadata['Accuracy'] == 'published, not trained again here'
        assert 'amp' not in row['Name'] and 'fsdp' not in row['Name']
        assert row['Weights'] != NO_WEIGHTS
        assert all(20 < value < 100 for result in row['Results'] for value in result['Metrics'].values())
        assert metadata['Training Log'].startswith(row['Weights'].rpartition('/')[0])
        assert ('TTA Log' in metadata) == (folder == 'segmentation')
        assert metadata.get('Best Epoch', metadata.get('Best Iteration')) <= schedule
    if row['Weights'] != NO_WEIGHTS:
        assert re.fullmatch(
            r'https://github\.com/MzeroMiko/VMamba/releases/download/%23\w+/\w[\w.-]*\.pth', row['Weights']
        )
        assert row['Converted From']['Weights'] == row['Weights']
        assert metadata['Converted Name'] == f'{row["Name"]}.pth'


@pytest.mark.parametrize('folder', FOLDERS)
def test_readme_tables(folder):
    """Each config stands in a table of its folder, with the figures of its row."""
    text = (ROOT / f'configs/{folder}/README.md').read_text()
    assert 'published' in text and 'measured here' in text
    for line_folder, row in ROWS:
        if line_folder != folder or 'custom' in row['Name'] or 'amp' in row['Name'] or 'fsdp' in row['Name']:
            continue
        (line,) = [line for line in text.splitlines() if line.startswith('|') and f']({row["Name"]}.py)' in line]
        assert f'| {row["Metadata"]["Parameters"]:,} | {row["Metadata"]["FLOPs"] / 1e9:.2f} G |' in line
        for result in row.get('Results', []):
            for value in result['Metrics'].values():
                assert f' {value} ' in line
        links = [row['Metadata'].get(key, '') for key in ('Published Config', 'Training Log', 'TTA Log')]
        links = [link for link in links if link.startswith(RELEASE)]
        assert line.count(f']({RELEASE}') == len(links) + (row['Weights'] != NO_WEIGHTS)
        assert all(f'({link})' in line for link in links)
        for key in ('Best Epoch', 'Best Iteration', 'Training Memory (MB)', 'Training Time (min/epoch)'):
            assert key not in row['Metadata'] or f' {row["Metadata"][key]:,} ' in line
        assert (f'({row["Weights"]})' in line) if row['Weights'] != NO_WEIGHTS else ('[weights]' not in line)
    for scope, name in re.findall(r'`?(mmpretrain|mmdet|mmseg)::([\w./-]+\.py)', text):
        package = importlib.util.find_spec(scope)
        assert (Path(package.origin).parent / '.mim/configs' / name).is_file(), name
    for target in re.findall(r'\]\((?!https?:)([^)]+)\)', text):
        assert (ROOT / 'configs' / folder / target).exists(), target


def mim(*arguments, folder):
    """Run mim as a user does, where nothing can be fetched."""
    proxy = 'http://127.0.0.1:9'  # the port that discards; nobody answers
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'mim', *arguments],
        cwd=folder,
        env={**os.environ, 'HTTPS_PROXY': proxy, 'HTTP_PROXY': proxy, 'NO_PROXY': '', 'no_proxy': ''},
        capture_output=True,
        text=True,
    )


def search(config, folder):
    """What mim knows of a config."""
    result = mim('search', 'mmvmamba', '--config', config, '--display-width', '200', folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_mim_search(tmp_path):
    text = search('vmamba-tiny-s1l8_8xb128_in1k', tmp_path)
    assert re.search(r'top_1_accuracy\s+82\.6', text) and 'vssm1_tiny_0230s_ckpt_epoch_264.pth' in text
    assert re.search(r'weight\s+none published', search('mask-rcnn_vmamba-b-s1l20_fpn_1x_coco', tmp_path))


def assert_config(path, folder):
    """A downloaded config is the shipped one."""
    assert Config.fromfile(path).model == read(ROOT / f'configs/{folder}/{path.name}').model


def test_mim_download(tmp_path):
    """The config comes without a network once the weights are there, and leaves them as they are."""
    name, weights = 'mask-rcnn_vmamba-t-s1l8_fpn_1x_coco', tmp_path / 'mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth'
    weights.write_bytes(b'there already')
    result = mim('download', 'mmvmamba', '--config', name, '--dest', '.', folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_config(tmp_path / f'{name}.py', 'detection')
    assert weights.read_bytes() == b'there already' and len(list(tmp_path.iterdir())) == 2


def test_mim_download_of_an_unknown_config(tmp_path):
    result = mim('download', 'mmvmamba', '--config', 'no-such-config', '--dest', '.', folder=tmp_path)
    assert result.returncode != 0 and 'no-such-config' in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'folder, name',
    [
        ('detection', 'mask-rcnn_vmamba-s-s1l20_fpn_1x_coco'),
        ('classification', 'vmamba-tiny-s1l8_1xb64-50e_custom'),
    ],
)
def test_mim_download_without_weights(folder, name, tmp_path):
    """Nobody published any: the config comes alone, also without a network."""
    result = mim('download', 'mmvmamba', '--config', name, '--dest', 'new', folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f'Successfully dumped {name}.py' in result.stdout
    (path,) = (tmp_path / 'new').iterdir()
    assert_config(path, folder)


def test_mim_download_out_of_reach(tmp_path):
    """Weights that can't be fetched are an error that names them, and nothing is left behind that looks like them."""
    name = 'mask-rcnn_vmamba-t-s1l8_fpn_1x_coco'
    result = mim('download', 'mmvmamba', '--config', name, '--dest', '.', folder=tmp_path)
    assert result.returncode != 0 and not list(tmp_path.iterdir())
    assert "host='github.com'" in result.stderr and 'Connection refused' in result.stderr
    assert 'mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth' in result.stderr

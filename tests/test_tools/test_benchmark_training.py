"""tools/benchmark/training.py: each codebase's demo through its Runner on CPU, and the figures."""

import json
from pathlib import Path

import pytest
import torch

from tests.test_tools.conftest import ROOT, load_tool
from tests.test_tools.test_launch import DEMO

QUICK = ['--device=cpu', '--batch=2', '--warmup=1', '--iterations=2', '--phases=1', '--workers=0', '--pixels=32']


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / 'tools/benchmark')
    monkeypatch.setenv('MMVMAMBA_COMMIT', 'abc')
    return load_tool('benchmark/training.py')


def test_measures_and_compares_a_config_with_another_setting(tool, tmp_path, capsys):
    """One that cannot run leaves the others their figures."""
    config, out = str(ROOT / DEMO['mmpretrain']), tmp_path / 'a.json'
    plain, fast = ['optim_wrapper.type=OptimWrapper'], ['optim_wrapper.dtype=bfloat16', 'as=fast']
    options = ['--baseline=fast', f'--out={out}', '--bare', 'eager', 'host']
    rows = tool.main([config, *plain, config, 'optim_wrapper.type=Nothing', config, *fast, *QUICK, *options])
    assert [row['name'] for row in rows] == [Path(config).stem, 'fast']
    for row in rows:
        assert row['iteration_ms'] > 0 and row['batch'] == 2 and row['processes'] == 1
        assert row['images_per_second'] == pytest.approx(2e3 / row['iteration_ms'])
        assert row['time_ratio'] == pytest.approx(row['iteration_ms'] / rows[1]['iteration_ms'])
        assert row['of_bare_eager'] == pytest.approx(row['bare_eager_ms'] / row['iteration_ms'])
        assert 'busy' not in row and row['host_ms'] > 0
        assert {'data', 'preprocess', 'backbone', 'head', 'backward', 'optimizer', 'hooks'} <= set(row['phases_ms'])
        assert row['phases_ms']['backbone'] > row['phases_ms']['neck'] > 0
        assert all(0 < value <= row['phases_ms'][name] for name, value in row['phases_host_ms'].items())
        assert 0 < sum(row['hooks_ms'].values()) <= row['phases_ms']['hooks'] and 'Clock' not in row['hooks_ms']
    report = json.loads(out.read_text())
    assert report['rows'] == json.loads(json.dumps(rows)) and report['commit'] == 'abc'
    assert 'optim_wrapper.type=Nothing: no figures' in capsys.readouterr().out
    table = tool.format_table(rows)
    assert '| fast |' in table and 'backward' in table and 'fast, ms of its hooks: ' in table


@pytest.mark.parametrize('scope', ['mmdet', pytest.param('mmseg', marks=pytest.mark.slow)])
def test_measures_detection_and_segmentation(tool, scope):
    (row,) = tool.main([str(ROOT / DEMO[scope]), *QUICK, '--bare', 'host', '--no-profile'])
    assert row['iteration_ms'] > 0 and row['host_ms'] > 0 and row['time_ratio'] == 1
    heads = {'rpn_head', 'roi_head'} if scope == 'mmdet' else {'decode_head'}
    assert heads < set(row['phases_ms'])


def test_without_any_figures_it_fails(tool):
    config = str(ROOT / DEMO['mmpretrain'])
    with pytest.raises(SystemExit, match='no config could be measured'):
        tool.main(['no-such-config.py', *QUICK])
    with pytest.raises(SystemExit):
        tool.parse_args(['a=b', config])


def test_an_interrupt_keeps_the_rows_before_it(tool, tmp_path, monkeypatch):
    def measure(config, options, args):
        if config == 'b':
            raise KeyboardInterrupt
        return dict(name=config, iteration_ms=1.0, images_per_second=1.0, phases_ms={})

    monkeypatch.setattr(tool, 'measure', measure)
    with pytest.raises(SystemExit, match='130'):
        tool.main(['a', 'b', 'c', f'--out={tmp_path / "rows.json"}', *QUICK])
    assert [row['name'] for row in json.loads((tmp_path / 'rows.json').read_text())['rows']] == ['a']


def test_sizes_and_classes_are_those_of_the_configs(tool):
    sizes = {}
    for scope in ('mmpretrain', 'mmdet', 'mmseg'):
        cfg, _ = tool.prepare(str(ROOT / DEMO[scope]), [], tool.parse_args(['x', *QUICK]))
        assert tool.find_classes(cfg) == (11 if scope == 'mmseg' else 10)
        sizes[scope] = tool.find_sizes(cfg)
    assert sizes['mmseg'] == [(128, 128)] and sizes['mmpretrain'] == [(224, 224)]
    assert len(set(sizes['mmdet'])) > 5 and all(min(size) == 800 < max(size) <= 1333 for size in sizes['mmdet'])


def test_samples_of_a_batch_have_one_size(tool):
    from synthetic import Detected

    data = Detected(8, [(32, 48), (48, 32)], 2, 3)
    shapes = [tuple(data[i]['inputs'].shape[1:]) for i in range(8)]
    assert shapes == [(32, 48)] * 2 + [(48, 32)] * 2 + [(32, 48)] * 2 + [(48, 32)] * 2
    objects = data[3]['data_samples'].gt_instances
    boxes = objects.bboxes.tensor
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0 and boxes[:, 2].max() <= 32
    assert objects.masks.masks.any((1, 2)).all() and objects.labels.max() < 3


def test_new_transformers_are_hidden_only_while_mmpretrain_is_imported(tool, monkeypatch):
    import importlib.metadata

    versions = dict(transformers='5.1.0')
    distribution = importlib.metadata.distribution

    class Found:
        def __init__(self, name):
            self.version = versions.get(name, '1.0')

    monkeypatch.setattr(importlib.metadata, 'distribution', Found)
    with tool.without_new_transformers():
        assert importlib.metadata.distribution('torch').version == '1.0'
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.distribution('transformers')
        versions['transformers'] = '4.57.0'
        assert importlib.metadata.distribution('transformers').version == '4.57.0'
    assert importlib.metadata.distribution is Found and distribution is not Found


def test_kernels_are_counted_without_overlaps(tool):
    from clock import count_kernels

    class Event:
        def __init__(self, name, begin=0, length=0, on_device=False):
            self.parts = (name, begin, length)
            self.on_device = on_device

        def name(self):
            return self.parts[0]

        def start_ns(self):
            return self.parts[1]

        def duration_ns(self):
            return self.parts[2]

        def is_user_annotation(self):
            return False

        def device_type(self):
            kinds = torch.autograd.DeviceType
            return kinds.CUDA if self.on_device else kinds.CPU

    events = [Event('cudaLaunchKernel'), Event('cuLaunchKernelEx'), Event('aten::add')]
    spans = ((0, 4_000_000), (2_000_000, 4_000_000), (9_000_000, 1_000_000))
    events += [Event('kernel', begin, length, True) for begin, length in spans]
    kineto = type('Results', (), dict(kineto_results=type('K', (), dict(events=lambda self: events))()))()
    profiler = type('Profiler', (), dict(profiler=kineto))()
    assert count_kernels(profiler, 1) == dict(busy_ms=7.0, launches=2, kernels=3)

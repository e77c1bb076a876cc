"""Exported models: ONNX files in onnxruntime and programs of torch.export, at sizes other than the traced one."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from mmvmamba import VSSMBackbone
from mmvmamba.cli import load_model, normalize, read_image
from mmvmamba.export.graphs import AdaptiveAvgPool, FeatureGraph, as_graph, as_tuple, relative_error
from mmvmamba.ops import backend_report

from .conftest import ROOT

DEMO = ROOT / 'configs/demo'
CONFIGS = dict(
    mmpretrain=f'{DEMO}/vmamba-nano_1xb64_digits-32px.py',
    mmdet=str(next(DEMO.glob('mask-rcnn_*.py'))),
    mmseg=str(next(DEMO.glob('*_upernet_*.py'))),
)
SIZES = [(1, 32, 160), (3, 72, 88), (2, 128, 104)]  # the tools trace 2 x 64 x 96; 72 and 88 give odd maps
SOME_SLOW = ['mmpretrain', *(pytest.param(scope, marks=pytest.mark.slow) for scope in ('mmdet', 'mmseg'))]
COMPILED = any(status.name == 'cpu' and status.available for status in backend_report())


@pytest.fixture(autouse=True)
def _quiet_logging(monkeypatch):
    """A logger that an earlier test made writes to that test's captured stream, which is closed by now."""
    monkeypatch.setattr(logging, 'raiseExceptions', False)


@pytest.fixture(scope='module', params=CONFIGS)
def whole(request, filled, tmp_path_factory):
    """A model of each codebase, filled, with its config and checkpoint."""
    config = CONFIGS[request.param]
    model = filled(load_model(config, None))
    checkpoint = tmp_path_factory.mktemp(request.param) / 'model.pth'
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    return request.param, config, str(checkpoint), model.eval()


def expected_outputs(scope, model, x):
    """What the codebase itself computes, not the exported graph."""
    with torch.no_grad():
        if scope == 'mmdet':
            return model.extract_feat(x)
        if scope == 'mmpretrain':
            return (model(x, mode='tensor'),)
        metas = [dict(img_shape=x.shape[2:], ori_shape=x.shape[2:], pad_shape=x.shape[2:], padding_size=[0] * 4)] * len(
            x
        )
        return (model.encode_decode(x, metas),)


def largest_error(run, scope, model, sizes=SIZES):
    errors = []
    for batch, height, width in sizes:
        x = torch.randn(batch, 3, height, width)
        errors.append(relative_error(as_tuple(run(x)), expected_outputs(scope, model, x)))
    return max(errors)


def session(path):
    onnxruntime = pytest.importorskip('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    running = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return running, lambda x: tuple(map(torch.from_numpy, running.run(None, {'images': x.numpy()})))


def test_onnx_of_each_codebase(tool, whole, tmp_path, capsys):
    onnx = pytest.importorskip('onnx')
    scope, config, checkpoint, model = whole
    path = tmp_path / 'deep/model.onnx'
    assert tool('export/to_onnx.py').main([config, checkpoint, '--out', str(path), '--check-sizes', '96x64']) == 0
    assert 'opset 17' in capsys.readouterr().out
    _, run = session(path)
    assert largest_error(run, scope, model) < 1e-4
    loaded = onnx.load(str(path))
    onnx.checker.check_model(loaded, full_check=True)
    assert {(entry.domain, entry.version) for entry in loaded.opset_import} == {('', 17)} and not loaded.functions
    assert {'Scan'} <= {node.op_type for node in loaded.graph.node}
    metadata = {entry.key: entry.value for entry in loaded.metadata_props}
    assert metadata['mean'] == '[127.5, 127.5, 127.5]' and metadata['channels'] in ('RGB', 'BGR')
    assert [path.name for path in path.parent.iterdir()] == ['model.onnx']


@pytest.mark.parametrize(
    'arch',
    [
        dict(dims=16, depths=(1, 1), stem='patch4', downsample='merge', d_state=4, ssm_ratio=2.0, gate='silu'),
        dict(dims=16, depths=(1, 1), downsample='conv2', scan_mode='bidi', out_norm='cnorm', norm_layer='bn'),
        dict(dims=16, depths=(1, 1), scan_mode='unidi', out_norm='softmax', mlp='gmlp', dt_rank=3),
        dict(dims=16, depths=(1, 1), core='ssd', d_state=4),
    ],
    ids=['vanilla', 'bidi', 'unidi', 'ssd'],
)
def test_onnx_of_other_archs(filled, tmp_path, arch):
    onnx = pytest.importorskip('onnx')
    from mmvmamba.export.onnx_scan import export_onnx

    backbone = filled(VSSMBackbone(arch, out_indices=(0, 1))).eval()
    path, graph = tmp_path / 'backbone.onnx', FeatureGraph(backbone).eval()
    export_onnx(graph, torch.randn(2, 3, 64, 96), ('first', 'second'), path, {})
    running, run = session(path)
    assert [output.name for output in running.get_outputs()] == ['first', 'second']
    operators = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert ('Scan' in operators) == (arch.get('core') != 'ssd') and 'Loop' not in operators
    for batch, height, width in [*SIZES, (1, 16, 16)]:
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            assert relative_error(run(x), backbone(x)) < 1e-4, (height, width)


@pytest.mark.skipif(not COMPILED, reason='a program needs a compiled op backend, and none is built')
@pytest.mark.parametrize('whole', SOME_SLOW, indirect=True)
def test_program_of_each_codebase(tool, whole, tmp_path):
    scope, config, checkpoint, model = whole
    path = tmp_path / 'model.pt2'
    assert tool('export/to_program.py').main([config, checkpoint, '--out', str(path)]) == 0
    program = torch.export.load(path)
    assert 'mmvmamba.selective_scan' in str(program.graph) or 'mmvmamba.ss2d_scan' in str(program.graph)
    # torch.export tells a map of one pixel from larger ones, so that a program takes sides from 33 pixels up
    assert largest_error(program.module(), scope, model, [(1, 33, 160), *SIZES[1:]]) < 1e-4


@pytest.mark.parametrize('height, width, cells', [(6, 9, (3, 3)), (7, 5, (2, 6)), (16, 11, (5, 1))])
def test_pooling_by_matrices_is_adaptive_pooling(height, width, cells):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    torch.testing.assert_close(AdaptiveAvgPool(cells)(x), nn.AdaptiveAvgPool2d(cells)(x))


def test_graphs_leave_the_model_as_it_is():
    model = load_model(CONFIGS['mmseg'], None).train()
    graph, names = as_graph(model, 'mmseg')
    assert model.training and not graph.training and names == ('scores',)
    assert any(isinstance(module, nn.AdaptiveAvgPool2d) for module in model.modules())
    graph, names = as_graph(model, 'mmseg', 'backbone')
    assert len(graph(torch.randn(1, 3, 32, 32))) == 4 and names == ()


def test_relative_error_sees_shapes_and_nan():
    one = torch.ones(2)
    assert relative_error([one, one * 1.5], [one, one]) == 0.5
    assert relative_error([one], [torch.ones(1, 2)]) == float('inf')
    assert relative_error([one * float('nan')], [one]) == float('inf')


def test_normalized_input_is_the_codebases_own(tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / 'a.png'), np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    image = read_image(tmp_path / 'a.png', 'image')
    for scope, config in CONFIGS.items():
        model = load_model(config, None)
        inputs = torch.from_numpy(image).permute(2, 0, 1)
        data = dict(inputs=inputs[None] if scope == 'mmpretrain' else [inputs], data_samples=None)
        if scope == 'mmdet':
            from mmdet.structures import DetDataSample

            data['data_samples'] = [DetDataSample(metainfo=dict(img_shape=(32, 32)))]
        if scope == 'mmseg':
            model.data_preprocessor.size = (32, 32)
        expected = model.data_preprocessor(data)['inputs']
        torch.testing.assert_close(normalize(model, image), expected[:, :, :32, :32], msg=scope)


@pytest.mark.parametrize(
    'name, changes, words',
    [
        ('to_onnx', dict(extra=['--size', '40']), '--size is 40 40, expected multiples of 32'),
        ('to_onnx', dict(extra=['--check-sizes', 'big']), "--check-sizes has 'big'"),
        ('to_onnx', dict(out='.'), 'a folder'),
        ('to_onnx', dict(out='mine.onnx/new.onnx'), "'mine.onnx' is not a folder"),
        ('to_onnx', dict(out='mine.onnx'), "--out 'mine.onnx' exists"),
        ('to_onnx', dict(checkpoint='absent.pth'), "checkpoint 'absent.pth' is not a file"),
        ('to_onnx', dict(config='cascade.py'), 'scan_mode is cascade2d'),
        ('to_program', dict(out='mine.pt2'), "--out 'mine.pt2' exists"),
        ('to_program', dict(out='model.pth'), 'expected a name that ends in .pt2'),
        ('to_program', dict(config='absent.py', out='new.pt2'), "config 'absent.py' is not a file"),
    ],
)
def test_bad_input_is_one_clear_line(tool, tmp_path, monkeypatch, capfd, name, changes, words):
    if name == 'to_onnx':
        pytest.importorskip('onnx')
        pytest.importorskip('onnxruntime')
    monkeypatch.chdir(tmp_path)
    for file in ('mine.onnx', 'mine.pt2'):
        (tmp_path / file).write_text('mine')
    arch = "dict(_delete_=True, dims=32, depths=(1, 1, 1, 1), scan_mode='cascade2d')"
    text = f"_base_ = ['{CONFIGS['mmpretrain']}']\nmodel = dict(backbone=dict(arch={arch}))\n"
    (tmp_path / 'cascade.py').write_text(text)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    values = dict(config=CONFIGS['mmpretrain'], checkpoint='none', out='new.onnx', extra=[])
    values.update(changes)
    arguments = [values['config'], values['checkpoint'], '--out', values['out'], *values['extra']]
    assert tool(f'export/{name}.py').main(arguments) == 2
    error = capfd.readouterr().err.splitlines()
    assert error[-1].startswith('error: ') and words in error[-1], error
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before

"""An exported file in the place of a config's backbone, and linear layers in int8."""

import copy
import logging
import pickle
from importlib.util import find_spec

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmvmamba import VSSMBackbone
from mmvmamba.checkpoint import CheckpointError
from mmvmamba.export import Int8Hook, RuntimeBackbone, to_int8, to_onnx
from mmvmamba.export.graphs import relative_error
from mmvmamba.export.int8 import Int8Linear
from mmvmamba.export.program import export_program
from mmvmamba.registry import HOOKS, MODELS

from .conftest import ROOT
from .test_evaluation import save_filled
from .test_launch import DEMO
from .test_train_test import QUICK, metrics

pytest.importorskip('onnxruntime')
SMALL = dict(arch=dict(dims=16, depths=(1, 1)), out_indices=(0, 1))


@pytest.fixture(scope='module')
def backbone():
    torch.manual_seed(0)
    return VSSMBackbone(**SMALL).eval()


@pytest.fixture(scope='module')
def files(backbone, tmp_path_factory):
    """A file of each kind."""
    folder = tmp_path_factory.mktemp('files')
    example = torch.rand(2, 3, 64, 96)
    found = {scan: to_onnx(backbone, example, folder / f'{scan}.onnx', scan=scan) for scan in ('rows', 'custom-op')}
    torch.export.save(export_program(backbone, example), folder / 'program.pt2')
    return dict(found, program=folder / 'program.pt2')


def maps(module, x):
    with torch.no_grad():
        return module(x)


@pytest.mark.parametrize('kind', ['rows', 'custom-op', 'program'])
def test_maps_are_the_models(kind, backbone, files):
    runtime = RuntimeBackbone(files[kind], **SMALL).eval()
    copied = [] if kind == 'program' else [copy.deepcopy(runtime)]
    for module in (runtime, *copied, pickle.loads(pickle.dumps(runtime))):
        for shape in ((2, 3, 64, 96), (1, 3, 96, 80)):
            x = torch.rand(shape)
            found, expected = maps(module, x), maps(backbone, x)
            assert [value.shape for value in found] == [value.shape for value in expected]
            assert all(value.is_contiguous() and value.dtype == torch.float32 for value in found)
            assert relative_error(found, expected) < 1e-5


def test_it_is_built_by_its_name(files):
    config = dict(type='mmvmamba.RuntimeBackbone', file=str(files['rows']), threads=2, **SMALL)
    assert isinstance(MODELS.build(config), RuntimeBackbone)


@pytest.mark.parametrize(
    'change, error, words',
    [
        (lambda m: m.train()(torch.rand(1, 3, 64, 64)), RuntimeError, 'cannot be trained; expected model.eval()'),
        (lambda m: m(torch.rand(1, 3, 64, 64).half()), TypeError, 'x is torch.float16, expected images of torch.fl'),
        (lambda m: m([1]), TypeError, 'x is list, expected images of torch.float32'),
        (lambda m: m(torch.rand(1, 4, 64, 64)), ValueError, r'x has shape \(1, 4, 64, 64\), expected \(any, 3, any'),
        (lambda m: m(torch.rand(3, 64, 64)), ValueError, r'x has shape \(3, 64, 64\)'),
        (lambda m: m(torch.rand(1, 3, 64, 64, requires_grad=True)), RuntimeError, 'x requires a gradient'),
    ],
)
def test_what_it_cannot_run_is_named(files, change, error, words):
    with pytest.raises(error, match=words):
        change(RuntimeBackbone(files['rows']).eval())


@pytest.mark.parametrize(
    'options, error, words',
    [
        (dict(file=3), TypeError, 'file is 3, expected the path'),
        (dict(file='none.onnx'), CheckpointError, 'does not exist; expected the path of an exported file'),
        (dict(file='.'), CheckpointError, 'is a folder'),
        (dict(threads=0), ValueError, 'threads is 0, expected at least 1'),
        (dict(threads='2'), TypeError, "threads is '2', expected an integer"),
        (dict(with_neck=1), TypeError, 'with_neck is 1, expected a bool'),
        (dict(device='tpu'), ValueError, "device is 'tpu', expected cpu or cuda"),
        (dict(arch='nano'), CheckpointError, r'gives 2 maps of \[16, 32\] channels, expected 4 of'),
        (dict(SMALL, in_channels=4), CheckpointError, 'takes images of 3 channels, expected 4 by the config'),
        (dict(pretrain=True), TypeError, 'RuntimeBackbone takes file, threads, device, with_neck, check_weights, run'),
    ],
)
def test_wrong_options_are_named(files, options, error, words):
    with pytest.raises(error, match=words):
        RuntimeBackbone(**dict(dict(file=files['rows']), **options))


@pytest.mark.parametrize('kind', ['text', 'archive'])
def test_a_file_of_another_kind_is_named(tmp_path, kind):
    path = tmp_path / 'other.onnx'
    if kind == 'text':
        path.write_text('no model')
    else:
        torch.save(dict(a=torch.ones(1)), path)
    with pytest.raises(CheckpointError, match=r'cannot be read by (onnxruntime|torch.export)'):
        RuntimeBackbone(path)


def test_scores_are_no_maps(tmp_path, backbone):
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone

        def forward(self, x):
            return self.backbone(x)[-1].mean((2, 3))

    path = to_onnx(Scores().eval(), torch.rand(1, 3, 64, 64), tmp_path / 'scores.onnx')
    with pytest.raises(CheckpointError, match=r'expected maps .* one a stage; --part backbone exports them'):
        RuntimeBackbone(path)


class Model(nn.Module):
    """A backbone and a head."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(32, 2)


def test_a_checkpoint_gives_the_rest(files, backbone, caplog):
    weights = Model(backbone).state_dict()
    model = Model(RuntimeBackbone(files['rows'], **SMALL))
    with caplog.at_level(logging.INFO):
        model.load_state_dict(weights)
    assert torch.equal(model.head.weight, weights['head.weight'])
    assert not [key for key in model.state_dict() if key.startswith('backbone.')]


# ---- int8 -----------------------------------------------------------------------------------------------------------
def test_int8_is_near_and_does_not_depend_on_the_batch(backbone):
    small = to_int8(copy.deepcopy(backbone))
    layers = [module for module in small.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == sum(type(module) is nn.Linear for module in backbone.modules()) > 0
    x = torch.rand(3, 3, 64, 64)
    both = maps(small, x)
    assert 1e-6 < relative_error(both, maps(backbone, x)) < 0.05
    one = maps(small, x[1:2])
    assert relative_error([value[1:2] for value in both], one) < 1e-5


def test_int8_survives_saving_and_copies(backbone):
    small, x = to_int8(copy.deepcopy(backbone)), torch.rand(1, 3, 64, 64)
    expected = maps(small, x)
    fresh = to_int8(VSSMBackbone(**SMALL).eval())
    maps(fresh, x)  # packs its own weights
    fresh.load_state_dict(small.state_dict())
    for other in (fresh, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert all(torch.equal(a, b) for a, b in zip(maps(other, x), expected))


def test_one_layer_in_two_places_stays_one():
    layer = nn.Linear(4, 4)
    module = to_int8(nn.Sequential(layer, nn.ReLU(), layer).eval())
    assert module[0] is module[2]


@pytest.mark.parametrize(
    'module, error, words',
    [
        (3, TypeError, 'module is a int, expected a torch.nn.Module'),
        (nn.Linear(2, 2), ValueError, 'module is in training mode'),
        (nn.Sequential(nn.ReLU()).eval(), ValueError, 'without a torch.nn.Linear inside'),
        (nn.Sequential(nn.Linear(2, 2)).half().eval(), ValueError, '0 of module has as weight a Parameter of torch.f'),
        (nn.Sequential(nn.Linear(2, 2, device='meta')).eval(), ValueError, 'linear layers on meta, expected cpu or'),
    ],
)
def test_what_cannot_be_int8_is_named(module, error, words):
    with pytest.raises(error, match=words):
        to_int8(module)


def test_int8_layers_refuse_gradients():
    module = to_int8(nn.Sequential(nn.Linear(4, 4)).eval())
    with pytest.raises(RuntimeError, match='x requires a gradient, which int8 layers cannot give'):
        module(torch.rand(1, 4, requires_grad=True))


def test_the_hook_needs_a_backbone():
    hook = HOOKS.build(dict(type='mmvmamba.Int8Hook'))
    assert isinstance(hook, Int8Hook)
    runner = Config(dict(model=None))
    runner.model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='Int8Hook found no VSSMBackbone in the Sequential'):
        hook.before_test(runner)


# ---- as users evaluate ----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_evaluation_of_a_file_is_that_of_the_model(scope, run, user_folder):
    """By the tools, with scores that several classes share; in int8 the scores move little."""
    save_filled(user_folder, scope)
    config, weights = str(ROOT / DEMO[scope]), f'{scope}.pth'
    part = [] if scope == 'mmdet' else ['--part', 'backbone']
    run(f'python {ROOT}/tools/export/to_onnx.py {config} {weights} --out {scope}.onnx', *part)
    runtime = ['model.backbone.type=mmvmamba.RuntimeBackbone', f'model.backbone.file={scope}.onnx']
    runtime += ['model.neck=None'] if scope == 'mmdet' else []
    found = {}
    kinds = dict(torch=[], file=runtime, int8=['default_hooks.int8.type=mmvmamba.Int8Hook'])
    if find_spec('openvino'):  # which is optional
        kinds['openvino'] = [*runtime, 'model.backbone.runtime=openvino']
    for name, options in kinds.items():
        work = user_folder / f'{scope}-{name}'
        run(f'python {ROOT}/tools/test.py {config} {weights} --work-dir {work}', *QUICK, *options)
        found[name] = {key: value for key, value in metrics(work).items() if 'time' not in key}
    files = [found[name] for name in ('file', 'openvino') if name in found]
    assert found['torch'] and all(file == pytest.approx(found['torch'], abs=0.1) for file in files)
    assert found['int8'].keys() == found['torch'].keys()

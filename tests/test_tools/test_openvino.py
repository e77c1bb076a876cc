"""Exported files in OpenVINO: each form of the scan, the library for it, and a file as a backbone."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from mmvmamba import VSSMBackbone
from mmvmamba.checkpoint import CheckpointError
from mmvmamba.export import RuntimeBackbone, onnxruntime_library, openvino_library, to_onnx
from mmvmamba.export import openvino as package
from mmvmamba.export.graphs import relative_error
from mmvmamba.export.onnx_scan import SCANS
from mmvmamba.export.openvino import __main__ as command
from mmvmamba.export.openvino import build
from mmvmamba.export.openvino import file as openvino_file
from mmvmamba.export.openvino.file import shared_core
from mmvmamba.export.program import export_program
from mmvmamba.export.runtimes import open_file

onnx = pytest.importorskip('onnx')
SMALL = dict(arch=dict(dims=16, depths=(1, 1)), out_indices=(0, 1))
SIZES = [(1, 32, 160), (3, 72, 88), (1, 16, 16)]  # 72 and 88 give odd maps
OPTIONS = dict(INFERENCE_PRECISION_HINT='f32')


@pytest.fixture(scope='module')
def openvino():
    return pytest.importorskip('openvino', reason='OpenVINO is not installed')


@pytest.fixture(scope='module')
def library(openvino, tmp_path_factory):
    """The library in its place, or built for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            openvino_library()
        except FileNotFoundError:
            folder = tmp_path_factory.mktemp('library')
            try:
                build.build_library(folder)
            except FileNotFoundError as error:
                pytest.skip(str(error))
            patch.setattr(package, 'FOLDER', folder)
        yield openvino_library()


@pytest.fixture(scope='module')
def core(library):
    core = shared_core()
    core.add_extension(str(library))
    return core


def run(core, path, x, size=None, **options):
    """A file on images, compiled for any size or for the one of the images."""
    model = core.read_model(path)
    if size is not None:
        model.reshape(list(x.shape))
    found = core.compile_model(model, 'CPU', dict(OPTIONS, **options))([x.numpy()])
    return [torch.from_numpy(value) for value in found.values()]


# ---- the forms of the scan ------------------------------------------------------------------------------------------
@pytest.mark.parametrize('scan', SCANS)
@pytest.mark.parametrize(
    'scan_mode, d_state, ratio', [('cross2d', 1, 1.0), ('cross2d', 4, 2.0), ('unidi', 1, 1.0), ('bidi', 2, 1.0)]
)
def test_form(core, filled, tmp_path, scan, scan_mode, d_state, ratio):
    """At sizes that were not traced, for any size and compiled for one; OpenVINO takes other ways in the two."""
    arch = dict(dims=16, depths=(1, 1), scan_mode=scan_mode, d_state=d_state, ssm_ratio=ratio)
    module = filled(VSSMBackbone(arch, out_indices=(0, 1))).eval()
    path = to_onnx(module, torch.randn(2, 3, 64, 96), tmp_path / 'maps.onnx', scan=scan)
    compiled = core.compile_model(core.read_model(path), 'CPU', OPTIONS)
    for batch, height, width in SIZES:
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = module(x)
        found = [torch.from_numpy(value) for value in compiled([x.numpy()]).values()]
        assert relative_error(found, expected) < 1e-5
    assert relative_error(run(core, path, x, size=x.shape), expected) < 1e-5


@pytest.mark.parametrize('float16', [False, True])
def test_channels_that_are_no_vectors(core, filled, tmp_path, float16):
    """20 channels are two vectors and a half; in float16 the scan stays in float32."""
    module = filled(VSSMBackbone(dict(dims=(20, 12), depths=(1, 1), dt_rank=2), out_indices=(0, 1))).eval()
    options = dict(scan='custom-op', float16=float16)
    if float16:
        pytest.importorskip('onnxruntime')
    path = to_onnx(module, torch.randn(1, 3, 64, 64), tmp_path / 'maps.onnx', **options)
    x = torch.randn(3, 3, 72, 88)
    with torch.no_grad():
        assert relative_error(run(core, path, x), module(x)) < (1e-2 if float16 else 1e-5)


# ---- the library ----------------------------------------------------------------------------------------------------
def scan_file(path, channels, mode='cross2d', **shapes):
    """A file that is the scan alone; its parameters are inputs too, of any size unless ``shapes`` says so."""
    ranks = dict(x=4, projections=4, dt_weight=3, dt_bias=2, A=3, skip=1)
    kind = onnx.TensorProto.FLOAT
    inputs = [
        onnx.helper.make_tensor_value_info(name, kind, shapes.get(name, [f'{name}{i}' for i in range(rank)]))
        for name, rank in ranks.items()
    ]
    outputs = [onnx.helper.make_tensor_value_info('y', kind, [None] * 4)]
    node = onnx.helper.make_node('SS2DScan', list(ranks), ['y'], domain='mmvmamba', scan_mode=mode)
    opsets = [onnx.helper.make_opsetid('', 17), onnx.helper.make_opsetid('mmvmamba', 1)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], 'scan', inputs, outputs), opset_imports=opsets, ir_version=8
    )
    onnx.save(model, str(path))
    return path


def scan_inputs(batch, height, width, channels, rank, states):
    random = np.random.default_rng(0)
    sizes = dict(x=(batch, height, width, channels), projections=(batch, height, width, 4 * (rank + 2 * states)))
    sizes.update(dt_weight=(4, rank, channels), dt_bias=(4, channels), A=(4, states, channels), skip=(channels,))
    values = {name: random.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    return dict(values, A=-np.exp(values['A']))


@pytest.mark.parametrize('mode', ['cross2d', 'unidi', 'bidi'])
@pytest.mark.parametrize('sizes', [(1, 7, 9, 96, 6, 1), (2, 16, 5, 20, 2, 4)], ids=['D=96', 'D=20, N=4'])
def test_its_numbers_are_those_in_onnxruntime_on_any_number_of_threads(core, tmp_path, mode, sizes):
    onnxruntime = pytest.importorskip('onnxruntime')
    path, values = scan_file(tmp_path / 'scan.onnx', sizes[3], mode), scan_inputs(*sizes)
    options = onnxruntime.SessionOptions()
    try:
        options.register_custom_ops_library(str(onnxruntime_library()))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    (expected,) = session.run(None, values)
    for threads in (1, 4):
        model = core.compile_model(path, 'CPU', dict(OPTIONS, INFERENCE_NUM_THREADS=threads))
        np.testing.assert_array_equal(model(values)[0], expected)


def test_its_threads_are_those_of_the_runtime(core, tmp_path):
    """With one thread all is computed by the caller's; with two another one takes its part."""
    path, values = scan_file(tmp_path / 'scan.onnx', 256), scan_inputs(2, 64, 64, 256, 8, 4)

    def own_part(threads):  # of the processor time
        model = core.compile_model(path, 'CPU', dict(OPTIONS, INFERENCE_NUM_THREADS=threads))
        model(values)
        own, whole = time.thread_time(), time.process_time()
        for _ in range(5):
            model(values)
        return (time.thread_time() - own) / (time.process_time() - whole)

    assert own_part(1) > 0.95
    if len(os.sched_getaffinity(0)) > 1:
        assert min(own_part(2) for _ in range(3)) < 0.9


@pytest.mark.parametrize(
    'name, shape, words',
    [
        ('dt_bias', (4, 7), r'dt_bias has shape \(4, 7\), expected \(4, D\) = \(4, 8\) for x of shape \(1, 4, 4, 8\)'),
        ('projections', (1, 4, 4, 13), r'projections has shape .*, expected \(B, H, W, 4 \(R \+ 2N\)\)'),
    ],
)
@pytest.mark.parametrize('known', [False, True])
def test_other_shapes_are_named(core, tmp_path, name, shape, words, known):
    """When the file is read, if it tells its sizes, else when it runs."""
    values = dict(scan_inputs(1, 4, 4, 8, 2, 1))
    values[name] = np.zeros(shape, np.float32)
    shapes = {key: list(value.shape) for key, value in values.items()} if known else {}
    path = scan_file(tmp_path / 'scan.onnx', 8, **shapes)
    with pytest.raises(RuntimeError, match=words):
        core.compile_model(path, 'CPU', OPTIONS)(values)


@pytest.mark.parametrize('mode', ['cascade2d', 'diagonal'])
def test_other_modes_are_named(core, tmp_path, mode):
    with pytest.raises(RuntimeError, match=f"scan_mode is '{mode}', expected cross2d, unidi or bidi"):
        core.read_model(scan_file(tmp_path / 'scan.onnx', 8, mode))


def test_another_release_of_openvino_is_named(openvino, tmp_path, monkeypatch):
    """The check that a C++ program meets: the library compares what it was built for with what runs."""
    found = build.find_openvino()
    monkeypatch.setattr(build, 'find_openvino', lambda: build.OpenVINO(found.folder, '2025.4.0-1-other'))
    monkeypatch.setattr(build, 'FLAGS', ('-std=c++17', '-O0'))
    path = build.build_library(tmp_path)
    assert path.name.startswith('mmvmamba_openvino-2025.4.0-') and [path] == list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match=f'was built for OpenVINO 2025.4.0-1-other, and this is {found.release}'):
        openvino.Core().add_extension(str(path))
    monkeypatch.undo()
    monkeypatch.setattr(package, 'FOLDER', tmp_path)
    with pytest.raises(FileNotFoundError, match=f'is built for OpenVINO 2025.4.0, and {found.release} is installed'):
        openvino_library()


def test_a_library_that_is_not_there_is_named(openvino, tmp_path, monkeypatch):
    monkeypatch.setattr(package, 'FOLDER', tmp_path)
    with pytest.raises(FileNotFoundError, match=r'is not built; build it .*: python -m mmvmamba.export.openvino'):
        openvino_library()
    (tmp_path / f'mmvmamba_openvino-{build.find_openvino().release}-0123456789ab.so').touch()
    with pytest.raises(FileNotFoundError, match='but of other sources or another build of it'):
        openvino_library()


@pytest.mark.parametrize(
    'compiler, words', [('no-such-compiler', "no C\\+\\+ compiler: 'no-such-compiler'"), ('false', 'compiler failed')]
)
def test_a_build_that_fails_leaves_nothing(openvino, tmp_path, monkeypatch, capsys, compiler, words):
    monkeypatch.setenv('CXX', compiler)
    with pytest.raises((FileNotFoundError, RuntimeError), match=words):
        build.build_library(tmp_path)
    assert not list(tmp_path.iterdir())
    assert command.main([]) == 1 and 'error: ' in capsys.readouterr().err


def test_openvino_without_headers_is_named(openvino, tmp_path, monkeypatch):
    monkeypatch.setattr(build, 'find_openvino', lambda: build.OpenVINO(tmp_path, '2026.4.1-1'))
    with pytest.raises(FileNotFoundError, match='has no headers of OpenVINO'):
        build.build_library(tmp_path)


def test_without_openvino_the_error_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(
        ImportError, match=r'OpenVINO cannot be imported .*; get it by: pip install mmvmamba\[openvino\]'
    ):
        openvino_library()
    assert command.main([]) == 1 and 'pip install mmvmamba[openvino]' in capsys.readouterr().err
    (tmp_path / 'maps.onnx').write_text('not read')
    with pytest.raises(ImportError, match='get it by'):
        open_file(tmp_path / 'maps.onnx', runtime='openvino')


# ---- a file as a backbone -------------------------------------------------------------------------------------------
@pytest.mark.parametrize('scan', SCANS)
def test_a_backbone(library, filled, tmp_path, scan):
    backbone = filled(VSSMBackbone(**SMALL)).eval()
    path = to_onnx(backbone, torch.rand(2, 3, 64, 96), tmp_path / 'maps.onnx', scan=scan)
    runtime = RuntimeBackbone(path, runtime='openvino', threads=2, **SMALL).eval()
    for shape in ((2, 3, 64, 96), (1, 3, 96, 80)):
        x = torch.rand(shape)
        with torch.no_grad():
            found, expected = runtime(x), backbone(x)
            kept = [value.clone() for value in found]
            runtime(torch.rand(shape))  # gives no memory twice
        assert relative_error(found, expected) < 1e-5
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, kept))


def test_what_a_file_says_of_itself(openvino, tmp_path):
    backbone = VSSMBackbone(**SMALL).eval()
    path = tmp_path / 'maps.onnx'
    for texts in ({}, dict(part='backbone', weights='0a 1b')):
        opened = open_file(to_onnx(backbone, torch.rand(1, 3, 64, 64), path, metadata=texts), runtime='openvino')
        plain = open_file(path)
        assert opened.metadata == plain.metadata == texts
        assert [value.shape for value in opened.outputs] == [(None, dims, None, None) for dims in (16, 32)]
        assert (opened.inputs, opened.device.type) == (plain.inputs, 'cpu')


def test_what_openvino_cannot_run_is_named(openvino, tmp_path):
    (tmp_path / 'text.onnx').write_text('no model')
    with pytest.raises(CheckpointError, match=r"text.onnx' cannot be read by OpenVINO"):
        RuntimeBackbone(tmp_path / 'text.onnx', runtime='openvino')
    with pytest.raises(RuntimeError, match="are on cuda, and OpenVINO runs on the CPU; expected device='cpu'"):
        open_file(tmp_path / 'text.onnx', torch.device('cuda'), runtime='openvino')


def test_a_file_that_needs_the_library(openvino, tmp_path, monkeypatch):
    path = to_onnx(VSSMBackbone(**SMALL).eval(), torch.rand(1, 3, 64, 64), tmp_path / 'maps.onnx', scan='custom-op')
    monkeypatch.setattr(package, 'FOLDER', tmp_path)
    monkeypatch.setattr(openvino_file, 'shared_core', openvino.Core)  # one that has no extension yet
    with pytest.raises(FileNotFoundError, match='is not built; build it'):
        RuntimeBackbone(path, runtime='openvino')


SIGNALS = """
import gc, signal, subprocess, sys
from pathlib import Path
import torch
from mmvmamba.export.runtimes import open_file

signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch does for the workers of a data loader
first, second = (open_file(Path(sys.argv[1]), runtime='openvino') for _ in range(2))
x = torch.rand(1, 3, 64, 64)
assert first.run(x)[0].equal(second.run(x)[0])
del first
gc.collect()
del second
gc.collect()
subprocess.run([sys.executable, '-c', 'pass'], check=True)
print('alive')
"""


def test_files_that_are_closed_leave_signals_alone(openvino, tmp_path):
    """OpenVINO's cores share a stack for signals on some processors; the first one that leaves takes it along."""
    path = to_onnx(VSSMBackbone(**SMALL).eval(), torch.rand(1, 3, 64, 64), tmp_path / 'maps.onnx')
    found = subprocess.run([sys.executable, '-c', SIGNALS, str(path)], capture_output=True, text=True, timeout=300)
    assert (found.returncode, found.stdout) == (0, 'alive\n'), found.stderr


def test_a_runtime_that_does_not_fit_is_named(tmp_path):
    torch.export.save(export_program(VSSMBackbone(**SMALL).eval(), torch.rand(2, 3, 64, 96)), tmp_path / 'maps.pt2')
    with pytest.raises(ValueError, match=r"runtime is 'openvino', expected None: .* runs in torch"):
        RuntimeBackbone(tmp_path / 'maps.pt2', runtime='openvino')
    (tmp_path / 'maps.onnx').write_text('not read')
    with pytest.raises(ValueError, match="runtime is 'tensorrt', expected one of onnxruntime, openvino"):
        RuntimeBackbone(tmp_path / 'maps.onnx', runtime='tensorrt')

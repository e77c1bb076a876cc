"""Packages of AOTInductor: what is refused before any work, what a package says, and runs in Python and in C++."""

import contextlib
import json
import os
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
import torch

from mmvmamba import VSSMBackbone
from mmvmamba.export import Package, op_library, to_package
from mmvmamba.export import package as packages
from mmvmamba.export.graphs import relative_error
from mmvmamba.export.program import accepted_sizes, dynamic_sizes, export_program
from mmvmamba.ops import backend_report

from .conftest import ROOT

DIGITS = str(ROOT / 'configs/demo/vmamba-nano_1xb64_digits-32px.py')
EXAMPLE = torch.rand(1, 3, 64, 64)
COMPILED = any(status.name == 'cpu' and status.available for status in backend_report())
pytestmark = [
    pytest.mark.skipif(not COMPILED, reason='a package needs the compiled ops, and none are built'),
    pytest.mark.skipif(
        torch.__version__.startswith(('2.4.', '2.5.')), reason='packages of AOTInductor need torch 2.6 or newer'
    ),
]


class Mine(torch.nn.Module):
    """Somebody's model around the backbone; of maps of half the sides."""

    def __init__(self, **options):
        super().__init__()
        self.encoder = VSSMBackbone(dict(dims=8, depths=(1,), **options), out_indices=(0,))
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        (feature,) = self.encoder(x)
        return self.head(feature.mean(dim=(2, 3))), feature


@pytest.fixture(scope='module')
def module():
    torch.manual_seed(0)
    return Mine().eval().requires_grad_(False)


@pytest.fixture(scope='module')
def compiled(module, tmp_path_factory):
    """A dynamic, frozen package of the module."""
    path = tmp_path_factory.mktemp('package') / 'mine.pt2'
    return to_package(module, EXAMPLE, path, freezing=True, metadata=dict(author='me'))


# ---- programs -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def program(module):
    return export_program(module, EXAMPLE)


def test_a_program_says_what_sizes_it_takes(module, program):
    assert accepted_sizes(program) == [(1, None), (3, 3), (5, None), (5, None)]  # a map of one pixel is another program
    assert accepted_sizes(export_program(module, EXAMPLE, dynamic=False)) == [(1, 1), (3, 3), (64, 64), (64, 64)]


def test_square_example_stands_for_other_shapes(module, program):
    x = torch.rand(3, 3, 40, 72)
    assert dynamic_sizes(program) == accepted_sizes(program)
    assert packages.find_python_ops(program) == []
    assert relative_error(program.module()(x), module(x)) < 1e-5


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda x: x + torch.ones(16, 16), r'do not fit the traced model \(Guard failed: .* == 16\)'),
        (lambda x: x.flatten(2) @ torch.ones(256, 1), r'do not fit the traced model \(Guard failed: .* == 256\)'),
        (lambda x: x if x.shape[2] == x.shape[3] else 2 * x, r'Guard failed: .*size.* == .*size'),
    ],
    ids=['sides', 'pixels', 'square'],
)
def test_a_model_for_some_sizes_only_is_refused(change, words, tmp_path):
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return change(x[:, :, ::4, ::4])

    with pytest.raises(ValueError, match=words):
        to_package(Fixed().eval(), EXAMPLE, tmp_path / 'mine.pt2')
    assert not list(tmp_path.iterdir())


def test_an_example_too_small_to_be_dynamic(tmp_path):
    class Halved(torch.nn.Module):
        def forward(self, x):
            return x[:, :, ::2, ::2] + 1

    with pytest.raises(ValueError, match=r'the height of the images is fixed at 1 by the model; expected any'):
        to_package(Halved().eval(), EXAMPLE[:, :, :1, :1], tmp_path / 'mine.pt2')
    assert dynamic_sizes(export_program(Halved().eval(), EXAMPLE)) == [(1, None), (3, 3), (3, None), (3, None)]


@pytest.mark.parametrize(
    'options, ops',
    [
        (dict(d_state=4, ssm_ratio=2.0, gate='silu', stem='patch4'), []),
        pytest.param(dict(scan_mode='cascade2d'), [], marks=pytest.mark.slow),
        (dict(core='ssd', d_state=4), ['mmvmamba::ssd_scan']),
    ],
    ids=['vanilla', 'cascade', 'ssd'],
)
def test_ops_with_kernels_in_python_are_found(options, ops):
    program = export_program(Mine(**options).eval(), EXAMPLE)
    assert 'mmvmamba' in str(program.graph)
    assert packages.find_python_ops(program) == ops


# ---- the library ----------------------------------------------------------------------------------------------------
def test_the_op_library_needs_no_python():
    if shutil.which('readelf') is None:
        pytest.skip('readelf, of binutils, is not installed')
    dynamic = subprocess.run(['readelf', '-d', op_library()], capture_output=True, text=True, check=True).stdout
    needed = [line for line in dynamic.splitlines() if 'NEEDED' in line]
    assert any('libtorch_cpu' in line for line in needed)
    assert not [line for line in needed if 'python' in line]
    undefined = subprocess.run(['readelf', '-Ws', '--dyn-syms', op_library()], capture_output=True, text=True).stdout
    assert not [line for line in undefined.splitlines() if ' UND ' in line and (' Py' in line or ' _Py' in line)]


def test_no_argument_of_an_op_is_a_dtype():
    """AOTInductor's calls of ops misread a ScalarType."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith('mmvmamba::')]
    schemas = [schema for name in names for schema in torch._C._jit_get_schemas_for_operator(name.partition('.')[0])]
    assert len(schemas) > 20
    assert not [schema for schema in schemas if 'ScalarType' in str(schema)]


# ---- refusals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'change, error, words',
    [
        (dict(module=3), TypeError, 'module is a int'),
        (dict(example=torch.rand(3, 64, 64)), TypeError, 'expected float32 images'),
        (dict(example=EXAMPLE.double()), TypeError, 'torch.float64'),
        (dict(example=7), TypeError, 'example is int'),
        (dict(module=Mine()), ValueError, 'training mode'),
        (dict(module=Mine().eval().double()), ValueError, 'torch.float64 on cpu, expected float32 on cpu'),
        (dict(module=Mine(core='ssd', with_initial_state=True).eval()), ValueError, 'carries no state'),
        (dict(path='mine.onnx'), ValueError, 'ends in .pt2'),
        (dict(precision='fp16'), ValueError, "precision is 'fp16', expected one of float32"),
        (dict(metadata=dict(size=3)), TypeError, "metadata has 'size': 3"),
    ],
)
def test_wrong_arguments(module, change, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = dict(dict(module=module, example=EXAMPLE, path='mine.pt2'), **change)
    with pytest.raises(error, match=words):
        to_package(**arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'what, words',
    [
        ('torch', 'torch is 2.5.1.cpu, and packages of AOTInductor need torch 2.6 or newer'),
        ('compiler', 'needs a C.. compiler, and none works; install g.., or set CXX'),
        ('extension', 'needs the compiled ops, and they cannot be used: not built'),
        ('gpu', "device is 'cuda:7', and torch sees [0-7] GPUs"),
        ('device', "device is 'meta', expected cpu or cuda"),
    ],
)
def test_a_machine_that_lacks_something_is_named(what, words, monkeypatch, tool, tmp_path, capfd):
    device = dict(gpu=torch.device('cuda:7'), device=torch.device('meta')).get(what, torch.device('cpu'))
    compiler = contextlib.nullcontext()
    if what == 'torch':
        monkeypatch.setattr(torch, '__version__', '2.5.1+cpu')
    if what == 'compiler':
        from torch._inductor import config, cpp_builder

        compiler = config.patch({'cpp.cxx': ('no-such-compiler',)})
        getattr(cpp_builder.cpp_compiler_search, 'cache_clear', lambda: None)()
    if what == 'extension':
        monkeypatch.setattr(packages, 'load_extension', lambda: 'not built')
    with compiler:
        with pytest.raises(RuntimeError, match=words):
            packages.check_can_package(device)
        if device.type != 'cpu':
            return
        # the tool says the same in one line, before it builds a model
        assert tool('export/to_package.py').main([DIGITS, 'none', '--out', str(tmp_path / 'new.pt2')]) == 2
        assert capfd.readouterr().err.splitlines()[-1].startswith('error: ')
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--out', 'mine.pt2'], "--out 'mine.pt2' exists"),
        (['--out', 'model.pth'], 'expected a name that ends in .pt2'),
        (['--out', '.'], 'a folder'),
        (['--out', 'new.pt2', '--static', '--batch-size', '0'], '--batch-size is 0'),
        (['--out', 'new.pt2', '--device', 'cuda:99'], "--device is 'cuda:99'"),
    ],
)
def test_bad_input_of_the_tool_is_one_clear_line(tool, tmp_path, monkeypatch, capfd, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine.pt2').write_text('mine')
    assert tool('export/to_package.py').main([DIGITS, 'none', *arguments]) == 2
    error = capfd.readouterr().err.splitlines()
    assert error[-1].startswith('error: ') and words in error[-1], error
    assert [path.name for path in tmp_path.iterdir()] == ['mine.pt2']


def test_files_that_are_no_package(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"package '.*absent\.pt2' is not a file"):
        Package(tmp_path / 'absent.pt2')
    (tmp_path / 'text.pt2').write_text('text')
    with zipfile.ZipFile(tmp_path / 'other.pt2', 'w') as archive:
        archive.writestr('model/wrapper_metadata.json', json.dumps(dict(AOTI_DEVICE_KEY='cpu')))
    for name in ('text.pt2', 'other.pt2'):
        with pytest.raises(ValueError, match=r'is no package of mmvmamba\.export\.to_package'):
            Package(tmp_path / name)


@pytest.mark.parametrize(
    'change, error, words',
    [
        (dict(torch='1.13.1'), ValueError, 'was compiled for torch 1.13.1 and this is'),
        pytest.param(
            dict(device='cuda'),
            RuntimeError,
            'is for CUDA, and torch sees no GPU',
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'),
        ),
    ],
)
def test_packages_for_another_machine(tmp_path, change, error, words):
    facts = dict(dict(sizes={}, dtype='float32', device='cpu', torch=torch.__version__, python_ops=[]), **change)
    with zipfile.ZipFile(tmp_path / 'model.pt2', 'w') as archive:
        archive.writestr('model/wrapper_metadata.json', json.dumps({packages.IMAGES: json.dumps(facts)}))
    with pytest.raises(error, match=words):
        Package(tmp_path / 'model.pt2')


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_a_part_may_be_called_graph(precision, monkeypatch, tmp_path):
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.graph = torch.nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.graph(x)

    taken = []
    monkeypatch.setattr(packages, '_compile', lambda program, path, *_: taken.append(program) or path.touch())
    module = Named().eval().requires_grad_(False)
    to_package(module, EXAMPLE, tmp_path / 'mine.pt2', precision=precision)
    result = taken[0].module()(EXAMPLE)
    assert result.dtype == torch.float32 and relative_error([result], [module(EXAMPLE)]) < 0.1


# ---- packages, which take a minute to compile -----------------------------------------------------------------------
@pytest.mark.slow
def test_a_package_gives_the_same_numbers_at_other_sizes(compiled, module):
    package = Package(compiled)
    assert package.metadata == dict(author='me') and package.python_ops == []
    for shape in ((1, 3, 64, 64), (2, 3, 40, 72), (3, 3, 5, 9), (1, 3, 224, 160)):
        x = torch.rand(shape)
        assert relative_error(package(x), module(x)) < 1e-5, shape
        assert relative_error(package(x.to(memory_format=torch.channels_last)), module(x)) < 1e-5, shape
    for images, error, words in (
        (torch.rand(1, 3, 4, 64), ValueError, 'images has height 4, expected 5 or more'),
        (torch.rand(1, 4, 64, 64), ValueError, 'images has channels 4, expected 3'),
        (torch.rand(3, 64, 64), TypeError, r'expected torch.float32, \(B, C, H, W\)'),
        (EXAMPLE.double(), TypeError, 'torch.float64'),
        (EXAMPLE.to('meta'), ValueError, 'images is on meta, expected cpu'),
    ):
        with pytest.raises(error, match=words):
            package(images)


@pytest.mark.slow
def test_a_program_in_cpp_gives_the_same_numbers(compiled, module, tmp_path):
    if shutil.which('cmake') is None:
        pytest.skip('cmake is not installed')
    folder, torch_folder = tmp_path / 'build', os.path.dirname(torch.__file__)
    for command in (
        ['cmake', '-S', ROOT / 'docs/cpp', '-B', folder, f'-DTORCH={torch_folder}'],
        ['cmake', '--build', folder],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(*shape):
        words = [folder / 'run_package', compiled, op_library(), 'images.bin', 'out.bin', *map(str, shape)]
        return subprocess.run(words, cwd=tmp_path, env={}, capture_output=True, text=True)  # nothing of Python's

    for shape in ((1, 3, 64, 64), (2, 3, 72, 40)):
        x = torch.rand(shape)
        x.numpy().tofile(tmp_path / 'images.bin')
        done = run(*shape)
        assert done.returncode == 0, done.stderr
        expected = module(x)
        assert done.stdout == ''.join(f'{list(out.shape)} of Float\n' for out in expected)
        values = torch.from_numpy(np.fromfile(tmp_path / 'out.bin', dtype=np.float32))
        outputs = [part.view(out.shape) for part, out in zip(values.split([o.numel() for o in expected]), expected)]
        assert relative_error(outputs, expected) < 1e-5
    for shape, words in (
        ((1, 3, 4, 64), 'HEIGHT is 4, expected 5 or more'),
        ((1, 4, 40, 40), 'CHANNELS is 4, expected 3'),
    ):
        done = run(*shape)
        assert done.returncode == 1 and words in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('arguments', [['--static', '--size', '96', '64', '--freezing'], ['--precision', 'bfloat16']])
def test_the_tool(tool, tmp_path, capsys, arguments):
    path = tmp_path / 'deep/model.pt2'
    assert tool('export/to_package.py').main([DIGITS, 'none', '--out', str(path), *arguments]) == 0
    said = capsys.readouterr().out
    assert 'largest relative error' in said and str(op_library()) in said
    assert [file.name for file in path.parent.iterdir()] == ['model.pt2']
    package = Package(path)
    assert package.metadata['mean'] == '[127.5, 127.5, 127.5]' and package(torch.rand(1, 3, 96, 64)).shape == (1, 10)
    if '--static' in arguments:
        with pytest.raises(ValueError, match='images has batch 2, expected 1'):
            package(torch.rand(2, 3, 96, 64))

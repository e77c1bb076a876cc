"""Every form of the scan in ONNX, at sizes that were not traced, and files in lower precision."""

import copy
import ctypes
import itertools

import numpy as np
import pytest
import torch

from mmvmamba import VSSMBackbone
from mmvmamba.export import onnxruntime_library, to_onnx
from mmvmamba.export.graphs import relative_error
from mmvmamba.export.onnx_loop_free import PIECES, PREFIX, function_text
from mmvmamba.export.onnx_scan import SCANS

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
SIZES = [(1, 32, 160), (3, 72, 88), (1, 16, 16)]  # 72 and 88 give odd maps


def has_library() -> bool:
    try:
        return onnxruntime_library().is_file()
    except FileNotFoundError:
        return False


LIBRARY = pytest.mark.skipif(not has_library(), reason='no library for onnxruntime, which needs a C++ compiler')
FORMS = [pytest.param(scan, marks=LIBRARY if scan == 'custom-op' else ()) for scan in SCANS]


class Maps(torch.nn.Module):
    """The maps of a small backbone."""

    def __init__(self, **options):
        super().__init__()
        self.backbone = VSSMBackbone(dict(dict(dims=16, depths=(1, 1)), **options), out_indices=(0, 1))

    def forward(self, x):
        return self.backbone(x)


def run(path, x, threads=1):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if has_library():
        options.register_custom_ops_library(str(onnxruntime_library()))
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return [torch.from_numpy(out) for out in session.run(None, {'images': x.numpy()})]


def largest_error(path, module, sizes=tuple(SIZES)):
    errors = []
    for batch, height, width in sizes:
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            errors.append(relative_error(run(path, x), module(x)))
    return max(errors)


@pytest.mark.parametrize('scan', FORMS)
@pytest.mark.parametrize(
    'scan_mode, d_state, ratio', [('cross2d', 1, 1.0), ('cross2d', 4, 2.0), ('unidi', 1, 1.0), ('bidi', 2, 1.0)]
)
def test_form(filled, tmp_path, scan, scan_mode, d_state, ratio):
    module = filled(Maps(scan_mode=scan_mode, d_state=d_state, ssm_ratio=ratio)).eval()
    path = to_onnx(module, torch.randn(2, 3, 64, 96), tmp_path / 'maps.onnx', scan=scan)
    assert largest_error(path, module) < 1e-5
    model = onnx.load(str(path))
    operators = {node.op_type for node in model.graph.node}
    assert ('Scan' in operators, 'SS2DScan' in operators) == (scan == 'rows', scan == 'custom-op')
    assert {entry.domain for entry in model.opset_import} == ({'', 'mmvmamba'} if scan == 'custom-op' else {''})
    assert not model.functions and 'Loop' not in operators
    assert not [node for node in model.graph.node if node.op_type == 'Constant' and node.attribute[0].name == 'value']


@pytest.mark.parametrize('scan', FORMS)
def test_large_steps_and_channels_that_are_no_vectors(filled, tmp_path, scan):
    """delta of more than a hundred, where exp overflows, and of about 0; 20 channels are two vectors and a half."""
    module = filled(Maps(dims=(20, 12), dt_rank=2)).eval()
    for name, parameter in module.named_parameters():
        if name.endswith('dt_projs_bias'):
            parameter.data.copy_(torch.linspace(-30, 150, parameter.numel()).view_as(parameter))
    path = to_onnx(module, torch.randn(1, 3, 64, 64), tmp_path / 'maps.onnx', scan=scan)
    x = torch.randn(3, 3, 72, 88)
    with torch.no_grad():
        plain, exact = module(x), copy.deepcopy(module).double()(x.double())
    # float32 itself is a few digits short here
    assert relative_error(run(path, x), exact) < 1e-6 + 2 * relative_error(plain, exact)


def prefix_scan(a, b):
    """The function of the loop-free form alone, in onnxruntime."""
    text = '<ir_version: 8, opset_import: ["" : 17, "mmvmamba" : 1]>\n'
    text += f'g (float[G, L, M] a, float[G, L, M] b) => (float[G, N, M] h) {{ h = mmvmamba.{PREFIX} (a, b) }}'
    model = onnx.parser.parse_model(text)
    model.functions.append(onnx.parser.parse_function(function_text(PREFIX)))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    return session.run(None, dict(a=a, b=b))[0]


@pytest.mark.parametrize('length', [1, 2, 15, 16, 17, 255, 256, 257, 4097, 16 * 16 * 32 + 1])
def test_prefix_scan(length):
    random = np.random.default_rng(0)
    a = random.uniform(0, 1, (2, length, 3)).astype(np.float32)
    b = random.standard_normal((2, length, 3)).astype(np.float32)
    a[:, ::7], a[:, 1::5] = 0, 1
    expected, h = [], np.zeros((2, 3))
    for t in range(length):
        h = a[:, t] * h + b[:, t]
        expected.append(h)
    np.testing.assert_allclose(prefix_scan(a, b), np.stack(expected, axis=1), rtol=1e-5, atol=1e-5)


def test_more_steps_than_the_levels_hold_are_an_error():
    ones = np.ones((1, int(np.prod(PIECES)) + 1, 1), np.float32)
    with pytest.raises(Exception, match='Reshape'):
        prefix_scan(ones, ones)


def test_graph_preparation_of_onnxruntime_takes_the_default(tmp_path):
    from onnxruntime.quantization.shape_inference import quant_pre_process

    backbone = VSSMBackbone(dict(dims=8, depths=(1,)), out_indices=(0,)).eval()
    path = to_onnx(backbone, torch.randn(1, 3, 64, 64), tmp_path / 'maps.onnx')
    quant_pre_process(str(path), str(tmp_path / 'prepared.onnx'))
    assert largest_error(tmp_path / 'prepared.onnx', backbone, SIZES[:1]) < 1e-5


@LIBRARY
def test_the_library_has_the_numbers_of_one_thread_on_many(tmp_path):
    backbone = VSSMBackbone(dict(dims=40, depths=(1,)), out_indices=(0,)).eval()
    path = to_onnx(backbone, torch.randn(1, 3, 64, 64), tmp_path / 'maps.onnx', scan='custom-op')
    x = torch.randn(2, 3, 96, 64)
    assert all(torch.equal(one, four) for one, four in zip(run(path, x), run(path, x, threads=4)))


@LIBRARY
@pytest.mark.parametrize(
    'index, shape, words',
    [
        (2, (4, 8), 'has shape .*, expected 3 dimensions'),
        (1, (2, 30, 19), 'has shape .*, expected'),
        (3, (4, 7), 'has shape .*, expected'),
    ],
)
def test_the_library_refuses_other_shapes(tmp_path, index, shape, words):
    backbone = VSSMBackbone(dict(dims=8, depths=(1,)), out_indices=(0,)).eval()
    model = onnx.load(str(to_onnx(backbone, torch.randn(1, 3, 64, 64), tmp_path / 'maps.onnx', scan='custom-op')))
    node = next(node for node in model.graph.node if node.op_type == 'SS2DScan')
    zeros = onnx.numpy_helper.from_array(np.zeros(shape, np.float32), 'other')
    model.graph.initializer.append(zeros)
    node.input[index] = 'other'
    onnx.save(model, str(tmp_path / 'other.onnx'))
    with pytest.raises(Exception, match=words):
        run(tmp_path / 'other.onnx', torch.randn(2, 3, 64, 64))


@LIBRARY
@pytest.mark.parametrize('mode', ['cascade2d', 'diagonal'])
def test_the_library_refuses_other_modes(tmp_path, mode):
    backbone = VSSMBackbone(dict(dims=8, depths=(1,)), out_indices=(0,)).eval()
    model = onnx.load(str(to_onnx(backbone, torch.randn(1, 3, 64, 64), tmp_path / 'maps.onnx', scan='custom-op')))
    node = next(node for node in model.graph.node if node.op_type == 'SS2DScan')
    next(item for item in node.attribute if item.name == 'scan_mode').s = mode.encode()
    onnx.save(model, str(tmp_path / 'other.onnx'))
    with pytest.raises(Exception, match=f"scan_mode is '{mode}', expected cross2d, unidi or bidi"):
        run(tmp_path / 'other.onnx', torch.randn(2, 3, 64, 64))


@LIBRARY
def test_the_library_refuses_a_runtime_that_is_too_old():
    """By a table as that of onnxruntime 1.16, which has only the first function."""
    words = []
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(lambda _, text: words.append(text) or 1)
    table = (ctypes.c_void_p * 400)(ctypes.cast(create, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda n: ctypes.addressof(table) if n < 17 else None)
    get_version = ctypes.CFUNCTYPE(ctypes.c_char_p)(lambda: b'1.16.3')
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p))
    register = ctypes.CDLL(str(onnxruntime_library())).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 1
    assert words == [b'mmvmamba needs onnxruntime 1.17 or newer, and this is 1.16.3']


def calibration():
    return [torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]


@pytest.mark.parametrize(
    'scan, options, error',
    [
        ('rows', dict(float16=True), 1e-2),
        ('rows', dict(quantize='dynamic'), 0.1),
        ('rows', dict(quantize='static', calibration=calibration()), 0.15),
        ('loop-free', dict(quantize='static', calibration=iter(calibration())), 0.15),
        pytest.param('custom-op', dict(float16=True), 1e-2, marks=LIBRARY),
        pytest.param('custom-op', dict(quantize='dynamic'), 0.1, marks=LIBRARY),
    ],
)
def test_lower_precision(tmp_path, scan, options, error):
    torch.manual_seed(0)
    module = Maps(dims=32).eval()
    whole = to_onnx(module, torch.randn(1, 3, 64, 64), tmp_path / 'whole.onnx', scan=scan)
    path = to_onnx(module, torch.randn(1, 3, 64, 64), tmp_path / 'small.onnx', scan=scan, **options)
    found = largest_error(path, module)
    assert 1e-5 < found < error
    small, large = onnx.load(str(path)), onnx.load(str(whole))
    kinds = {tensor.data_type for tensor in small.graph.initializer}
    wanted = onnx.TensorProto.FLOAT16 if options.get('float16') else onnx.TensorProto.INT8
    assert wanted in kinds and sum(t.ByteSize() for t in small.graph.initializer) < 0.65 * sum(
        t.ByteSize() for t in large.graph.initializer
    )
    elements = {value.type.tensor_type.elem_type for value in [*small.graph.input, *small.graph.output]}
    assert elements == {onnx.TensorProto.FLOAT}
    assert sorted(file.name for file in tmp_path.iterdir()) == ['small.onnx', 'whole.onnx']


@pytest.mark.parametrize(
    'options, error, words',
    [
        (dict(scan='column'), ValueError, "scan is 'column', expected one of auto, rows, loop-free, custom-op"),
        (dict(quantize='int4'), ValueError, "quantize is 'int4', expected dynamic, static or None"),
        (dict(quantize='dynamic', float16=True), ValueError, 'expected one of the two'),
        (dict(quantize='static'), ValueError, 'calibration is not given'),
        (dict(quantize='dynamic', calibration=[]), ValueError, "calibration is given and quantize is 'dynamic'"),
        (dict(quantize='static', calibration=[]), ValueError, 'calibration has no images'),
        (dict(quantize='static', calibration=[3]), TypeError, r'calibration has int, expected images \(B, C, H, W\)'),
        (dict(scan='custom-op', quantize='static', calibration=[]), ValueError, "expected scan 'rows' or 'loop-free'"),
        (dict(scan='loop-free', float16=True), ValueError, "expected scan 'rows' or 'custom-op'"),
    ],
)
def test_bad_options(tmp_path, options, error, words):
    module = VSSMBackbone(dict(dims=8, depths=(1,)), out_indices=(0,)).eval()
    with pytest.raises(error, match=words):
        to_onnx(module, torch.randn(1, 3, 64, 64), tmp_path / 'file.onnx', **options)
    assert not list(tmp_path.iterdir())


def test_float16_of_heads_is_refused(tmp_path):
    module = VSSMBackbone(dict(dims=16, depths=(1,), core='ssd', d_state=4), out_indices=(0,)).eval()
    with pytest.raises(ValueError, match="core is 'ssd', expected 's6' for float16"):
        to_onnx(module, torch.randn(1, 3, 64, 64), tmp_path / 'file.onnx', float16=True)
    assert list(itertools.chain(tmp_path.iterdir())) == []

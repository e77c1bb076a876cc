"""mmvmamba.export.to_onnx on a user's own module, and what torch.onnx.export says by itself."""

import pytest
import torch

from mmvmamba import VSSMBackbone
from mmvmamba.export import to_onnx


class Mine(torch.nn.Module):
    """Somebody's model around the backbone."""

    def __init__(self):
        super().__init__()
        self.encoder = VSSMBackbone(dict(dims=8, depths=(1, 1)), out_indices=(1,))
        self.head = torch.nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(x)[0].mean(dim=(2, 3)))


@pytest.fixture(scope='module')
def module():
    torch.manual_seed(0)
    return Mine().eval()


def test_a_module_of_ones_own(module, tmp_path):
    import onnxruntime

    path = to_onnx(module, torch.rand(2, 3, 64, 96), tmp_path / 'mine.onnx', metadata=dict(author='me'))
    assert [file.name for file in tmp_path.iterdir()] == ['mine.onnx']
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    assert session.get_modelmeta().custom_metadata_map == dict(author='me')
    for shape in ((1, 3, 64, 64), (3, 3, 40, 72)):
        x = torch.rand(shape)
        (scores,) = session.run(['output0'], {'images': x.numpy()})
        torch.testing.assert_close(torch.from_numpy(scores), module(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('change', 'error', 'words'),
    [
        (dict(module=3), TypeError, 'module is a int'),
        (dict(example=torch.rand(3, 64, 64)), TypeError, 'expected images'),
        (dict(module=Mine()), ValueError, 'training mode'),
        (dict(module=Mine().eval().double()), ValueError, 'torch.float64 on cpu, expected float32'),
    ],
)
def test_bad_input(module, change, error, words, tmp_path):
    arguments = dict(dict(module=module, example=torch.rand(1, 3, 64, 64), path=tmp_path / 'file.onnx'), **change)
    with pytest.raises(error, match=words):
        to_onnx(**arguments)
    assert not list(tmp_path.iterdir())


def test_plain_export_names_the_way(module, tmp_path):
    with pytest.raises(RuntimeError, match=r'mmvmamba\.export\.to_onnx'):
        torch.onnx.export(module, (torch.rand(1, 3, 64, 64),), str(tmp_path / 'plain.onnx'), dynamo=False)

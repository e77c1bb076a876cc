"""torch.func on the whole backbone: right by the naive backend, an error that names the op by the others."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from mmvmamba import VSSMBackbone
from mmvmamba.ops import use_backend


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return VSSMBackbone(dict(dims=8, depths=(1, 1)), out_indices=(1,)).eval()


@pytest.fixture(scope='module')
def images():
    return torch.rand(3, 3, 16, 16)


def loss(model, parameters, image):
    return functional_call(model, parameters, (image[None],))[0].square().sum()


def test_gradient_for_each_sample(model, images):
    parameters = dict(model.named_parameters())
    with use_backend('naive'):
        each = vmap(grad(lambda p, image: loss(model, p, image)), (None, 0))(parameters, images)
        for i, image in enumerate(images):
            expected = torch.autograd.grad(loss(model, parameters, image), list(parameters.values()))
            for found, value in zip(each.values(), expected):
                torch.testing.assert_close(found[i], value, rtol=1e-4, atol=1e-4)


def test_batches_by_vmap_and_functional_call(model, images):
    moved = {name: value + 0.01 for name, value in model.named_parameters()}
    together = vmap(lambda image: functional_call(model, moved, (image[None],))[0][0])(images)
    torch.testing.assert_close(together, functional_call(model, moved, (images,))[0])
    assert not torch.allclose(together, model(images)[0])


def test_forward_mode(model, images):
    direction = torch.randn_like(images)
    with use_backend('naive'), torch.no_grad():
        double = VSSMBackbone(dict(dims=8, depths=(1, 1)), out_indices=(1,)).eval().double()
        double.load_state_dict(model.state_dict())
        x, v = images.double(), direction.double()
        _, tangent = jvp(lambda x: double(x)[0], (x,), (v,))
        expected = (double(x + 1e-6 * v)[0] - double(x - 1e-6 * v)[0]) / 2e-6
    torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-5)


def test_compiled_ops_name_themselves(model, images):
    parameters = dict(model.named_parameters())
    with pytest.raises(NotImplementedError, match='ss2d_scan'):
        grad(lambda p: loss(model, p, images[0]))(parameters)
    with pytest.raises(NotImplementedError, match='ss2d_scan'):
        jvp(lambda x: model(x)[0], (images,), (images,))

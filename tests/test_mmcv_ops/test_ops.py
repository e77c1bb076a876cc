"""What compiled mmcv has no CPU code for, or reads wrongly: each op against its definition."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmvmamba.mmcv_ops import roi_weights
from mmvmamba.mmcv_ops.extension import FUNCTIONS, fill
from tests.test_mmcv_ops.cases import DEFORM, make_boxes, make_deform, make_rois

ROI_ALIGN = dict(aligned_height=3, aligned_width=2, spatial_scale=0.5, sampling_ratio=0, aligned=True)
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture
def random():
    import numpy

    return numpy.random.RandomState(0)


def draw(random, *shape):
    return torch.from_numpy(random.standard_normal(shape).astype('f4'))


@pytest.mark.parametrize('gamma, alpha', [(2.0, 0.25), (0.0, 0.5), (1.5, 0.9)])
@pytest.mark.parametrize('weighted', [False, True])
def test_sigmoid_focal_loss_is_its_formula_and_derivative(gamma, alpha, weighted, random):
    logits = (3 * draw(random, 40, 5)).double().requires_grad_()
    target = torch.from_numpy(random.randint(0, 6, 40))  # 5 is background
    weight = torch.rand(5).double() if weighted else torch.empty(0).double()
    positive = F.one_hot(target, 6)[:, :5].bool()
    p = torch.where(positive, logits.sigmoid(), (-logits).sigmoid())
    loss = torch.where(positive, alpha, 1 - alpha) * (1 - p) ** gamma * -p.log()
    if weighted:
        loss = loss * F.pad(weight, (0, 1), value=1)[target][:, None]
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    out, grad_out = torch.zeros(40, 5).double(), torch.zeros(40, 5).double()
    arguments = (logits.detach(), target, weight)
    FUNCTIONS['sigmoid_focal_loss_forward'](*arguments, out, gamma=gamma, alpha=alpha)
    FUNCTIONS['sigmoid_focal_loss_backward'](*arguments, grad_out, gamma=gamma, alpha=alpha)
    torch.testing.assert_close(out, loss.detach())
    torch.testing.assert_close(grad_out, grad)


@pytest.mark.parametrize('gamma, alpha', [(2.0, 0.25), (0.0, 0.5), (1.5, 0.9)])
def test_softmax_focal_loss_is_its_formula_and_derivative(gamma, alpha, random):
    logits = (3 * draw(random, 40, 5)).double().requires_grad_()
    target = torch.from_numpy(random.randint(-1, 5, 40))  # -1 is no class
    weight = torch.rand(5).double()
    p = logits.softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    loss = torch.where(target < 0, 0, alpha * (1 - p) ** gamma * -p.log() * weight[target])
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    out, buffer, grad_out = torch.zeros(40).double(), torch.zeros(40).double(), torch.zeros(40, 5).double()
    softmax = logits.detach().softmax(1)
    FUNCTIONS['softmax_focal_loss_forward'](softmax, target, weight, out, gamma=gamma, alpha=alpha)
    FUNCTIONS['softmax_focal_loss_backward'](softmax, target, weight, buffer, grad_out, gamma=gamma, alpha=alpha)
    torch.testing.assert_close(out, loss.detach())
    torch.testing.assert_close(grad_out, grad)


def test_losses_stay_finite_at_the_ends():
    logits, target, empty = torch.tensor([[200.0, -200.0]]), torch.tensor([1]), torch.empty(0)
    out = torch.zeros(1, 2)
    for name in ('sigmoid_focal_loss_forward', 'sigmoid_focal_loss_backward'):
        FUNCTIONS[name](logits, target, empty, out, gamma=2.0, alpha=0.25)
        assert out.isfinite().all()


def test_roi_pool_takes_the_largest_pixel_of_each_bin(random):
    maps, scale, bins = draw(random, 2, 3, 9, 11).relu(), 0.5, (3, 2)
    rois = make_rois(random, 12, 2, 20, 'any')
    rois[0, 1:] = torch.tensor([30.0, 30, 40, 40])  # outside
    rois[1, 1:] = torch.tensor([5.0, 5, 2, 2])  # no pixel
    out, argmax = torch.full((12, 3, *bins), 7.0), torch.zeros(12, 3, *bins, dtype=torch.int)
    settings = dict(pooled_height=bins[0], pooled_width=bins[1], spatial_scale=scale)
    FUNCTIONS['roi_pool_forward'](maps, rois, out, argmax, **settings)
    grad, expected_grad = draw(random, *out.shape), torch.zeros(maps.shape)
    for r, (image, *ends) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (end * scale for end in (ends[0], ends[1], ends[2] + 1, ends[3] + 1))
        for i in range(bins[0]):
            for j in range(bins[1]):
                ends_of = [(y1, y2, i, bins[0], 9), (x1, x2, j, bins[1], 11)]
                rows, columns = (
                    range(
                        min(max(math.floor(low + k * (high - low) / n), 0), size),
                        min(max(math.ceil(low + (k + 1) * (high - low) / n), 0), size) if high > low else 0,
                    )
                    for low, high, k, n, size in ends_of
                )
                for c in range(3):
                    pixels = [(maps[int(image), c, y, x].item(), -y, -x) for y in rows for x in columns]
                    value, y, x = max(pixels, default=(0.0, 0, 1))  # the first of equal ones
                    assert out[r, c, i, j] == value
                    assert argmax[r, c, i, j] == -y * 11 - x
                    if pixels:
                        expected_grad[int(image), c, -y, -x] += grad[r, c, i, j]
    got = torch.zeros(maps.shape)
    FUNCTIONS['roi_pool_backward'](grad, rois, argmax, got, **settings)
    torch.testing.assert_close(got, expected_grad)


def test_attention_is_mmcvs_own_in_torch(random):
    ops = pytest.importorskip('mmcv.ops.multi_scale_deform_attn')
    shapes = torch.tensor([[5, 7], [3, 4]])
    value = draw(random, 2, 5 * 7 + 3 * 4, 3, 4).double()
    locations = (0.5 + 0.5 * draw(random, 2, 6, 3, 2, 5, 2)).double()
    weights = draw(random, 2, 6, 3, 2, 5).double().softmax(-1)
    leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
    expected = ops.multi_scale_deformable_attn_pytorch(leaves[0], shapes, *leaves[1:])
    starts = torch.tensor([0, 35])
    out = FUNCTIONS['ms_deform_attn_forward'](value, shapes, starts, locations, weights, im2col_step=64)
    torch.testing.assert_close(out, expected.detach())
    grad = draw(random, *out.shape).double()
    grads = [torch.zeros_like(leaf) for leaf in leaves]
    FUNCTIONS['ms_deform_attn_backward'](value, shapes, starts, locations, weights, grad, *grads, im2col_step=64)
    for got, want in zip(grads, torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(got, want)


def align(maps, rois, mode=1):
    out = maps.new_zeros(len(rois), maps.shape[1], 3, 2)
    places = [torch.zeros_like(out) if mode == 0 else out.new_zeros(0) for _ in range(2)]
    FUNCTIONS['roi_align_forward'](maps, rois, out, *places, **ROI_ALIGN, pool_mode=mode)
    return out, places


@pytest.mark.parametrize('mode', [0, 1])
def test_channels_last_maps_are_read_right(mode, random):
    maps, rois = draw(random, 2, 3, 9, 11), make_rois(random, 5, 2, 20, 'any')
    out, places = align(maps, rois, mode)
    assert torch.equal(align(maps.contiguous(memory_format=torch.channels_last), rois, mode)[0], out)
    grad, results = draw(random, *out.shape), []
    for memory in (torch.contiguous_format, torch.channels_last):
        buffer = torch.zeros(maps.shape).contiguous(memory_format=memory)
        strided = grad.contiguous(memory_format=memory)
        FUNCTIONS['roi_align_backward'](strided, rois, *places, buffer, **ROI_ALIGN, pool_mode=mode)
        results.append(buffer)
    assert torch.equal(*results) and results[0].any()


@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_half_precision_is_float32_rounded_once(dtype, random):
    maps, rois = draw(random, 2, 3, 9, 11).to(dtype), make_rois(random, 5, 2, 20, 'round').to(dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16):  # must not matter inside
        assert torch.equal(align(maps, rois)[0], align(maps.float(), rois.float())[0].to(dtype))
        tensors = make_deform(random, *DEFORM[1])
        input, weight, offset, mask, bias, grad = (tensor.to(dtype) for tensor in tensors)
        names = ('kernel_h', 'kernel_w', 'stride_h', 'stride_w', 'pad_h', 'pad_w', 'dilation_h', 'dilation_w')
        settings = dict(zip(names, (3, 3, 2, 1, 1, 0, 1, 1)), group=2, deformable_group=1, with_bias=True)
        outs = []
        for cast in (lambda value: value, lambda value: value.float()):
            values = [cast(value) for value in (input, weight, bias, offset, mask)]
            out, empty = torch.zeros_like(cast(grad)), torch.zeros(0)
            FUNCTIONS['modulated_deform_conv_forward'](*values[:3], empty, *values[3:], out, empty, **settings)
            outs.append(out.to(dtype))
    assert torch.equal(*outs) and outs[0].any()


@pytest.mark.parametrize('dtype', [*HALVES, torch.float64], ids=str)
def test_nms_in_other_precisions(dtype, random):
    boxes, scores = make_boxes(random, 60, 'grid')
    kept = FUNCTIONS['nms'](boxes.to(dtype), scores.to(dtype), iou_threshold=0.4, offset=0)
    assert torch.equal(kept, FUNCTIONS['nms'](boxes, scores, iou_threshold=0.4, offset=0)) and 1 < len(kept) < 60


def test_no_boxes():
    none = torch.empty(0, 4), torch.empty(0)
    assert FUNCTIONS['nms'](*none, iou_threshold=0.5, offset=0).shape == (0,)
    dets = torch.empty(0, 5)
    settings = dict(iou_threshold=0.5, sigma=0.5, min_score=0.1, method=1, offset=0)
    assert FUNCTIONS['softnms'](*none, dets, **settings).shape == (0,)
    assert FUNCTIONS['nms_match'](dets, iou_threshold=0.5) == []


@pytest.mark.parametrize('ratio, aligned', [(0, True), (2, False)])
def test_the_deterministic_gradient_is_torchvisions(ratio, aligned, random):
    rois, grad, shape = make_rois(random, 9, 3, 40, 'any'), draw(random, 9, 4, 3, 2), (3, 4, 12, 9)
    got = roi_weights.mean_gradient(grad, rois, 0.25, ratio, aligned, torch.Size(shape))
    want = torch.ops.torchvision._roi_align_backward(grad, rois, 0.25, 3, 2, *shape, ratio, aligned)
    assert (got - want).norm() <= 1e-6 * want.norm()


def test_a_second_backward_does_not_take_the_first_ones_weights(random):
    input, weight, offset, _, _, grad = make_deform(random, *DEFORM[0])
    settings = dict(kW=3, kH=3, dW=1, dH=1, padW=1, padH=1, dilationW=1, dilationH=1)
    settings.update(group=1, deformable_group=1, im2col_step=2)
    scratch, grads = torch.zeros(0), [torch.zeros_like(value) for value in (input, offset)]
    FUNCTIONS['deform_conv_backward_input'](input, offset, grad, *grads, weight, scratch, **settings)
    got, want = torch.zeros_like(weight), torch.zeros_like(weight)
    parameters = FUNCTIONS['deform_conv_backward_parameters']
    parameters(input, offset, 3 * grad, got, scratch, scratch, **settings, scale=1)
    parameters(input, offset, grad, want, torch.zeros(0), scratch, **settings, scale=3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_other_ops_are_refused_when_called():
    namespace = {}
    fill(namespace)
    refused = namespace['__getattr__']('tin_shift_forward')
    with pytest.raises(NotImplementedError, match=r'tin_shift_forward .* MMCV_WITH_OPS=1 pip install'):
        refused(torch.zeros(1))
    with pytest.raises(AttributeError, match='__path__'):
        namespace['__getattr__']('__path__')

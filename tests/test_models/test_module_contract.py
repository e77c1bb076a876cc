"""What people do to a backbone every day: hooks, adapters, checkpointing, CAM, offloading, LoRA, counting of FLOPs."""

import contextlib
import copy

import pytest
import torch
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from mmvmamba import VSSMBackbone
from mmvmamba.ops import use_backend
from tests.test_models.interventions import Around, LoRA, Recomputed
from tests.test_models.published import Published

ARCH = dict(dims=8, depths=(1, 1, 2, 1))


def build(**options):
    torch.manual_seed(0)
    return VSSMBackbone(dict(ARCH, **options)).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 40, 56, requires_grad=True)


def outputs_of(model, names, x):
    """What forward hooks on modules get."""
    outs, handles = {}, []
    for name in names:
        seen = outs.setdefault(name, [])
        handles.append(model.get_submodule(name).register_forward_hook(lambda *call, seen=seen: seen.append(call[2])))
    maps = model(x)
    for handle in handles:
        handle.remove()
    return outs, maps


def assert_same(values, expected, atol=1e-5):
    for value, reference in zip(values, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=atol)


def gradients(model, x):
    model.zero_grad()
    sum(out.square().mean() for out in model(x)).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


# ---- hooks ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('norm_layer', ['ln', 'ln2d', 'bn'])
@pytest.mark.parametrize('stem, downsample', [('conv3x2', 'conv3'), ('patch4', 'merge'), ('patch4', 'conv2')])
def test_every_map_has_channels_second_and_lies_channels_last(norm_layer, stem, downsample, images):
    model = build(norm_layer=norm_layer, stem=stem, downsample=downsample)
    maps = {name: module for name, module in model.named_modules() if name not in ('', 'layers')}
    inside = ('.in_proj', '.out_proj', '.act', '.out_act', '.dropout', '.fc1', '.fc2', '.drop', '.reduction')
    names = [name for name in maps if not name.endswith(inside) and name != 'layers.3.downsample']
    expected, _ = outputs_of(Published(model), names, images)
    for x in (images, images.to(memory_format=torch.channels_last)):
        outs, returned = outputs_of(model, names, x)
        for name, (out,) in ((name, calls[:1]) for name, calls in outs.items()):
            assert out.shape == expected[name][0].shape, name
            assert out.is_contiguous(memory_format=torch.channels_last), name
        assert all(out.is_contiguous() for out in returned)


def test_a_module_takes_other_strides():
    model = build()
    x = torch.randn(2, 8, 9, 7)
    for name in (
        'layers.0',
        'layers.0.blocks.0',
        'layers.0.blocks.0.op',
        'layers.0.blocks.0.mlp',
        'layers.0.downsample',
    ):
        module = model.get_submodule(name)
        expected = module(x.contiguous(memory_format=torch.channels_last))
        for other in (x, x.transpose(2, 3).contiguous().transpose(2, 3)):
            assert_same([module(other)], [expected])


def test_a_hook_on_a_stage_gets_its_map_before_downsampling(images):
    model = build()
    outs, maps = outputs_of(model, ['layers.2'], images)
    (out,) = outs['layers.2']
    assert out.shape == (2, 32, 3, 4)
    assert_same([model.outnorm2(out)], [maps[2]])


def test_a_hook_on_a_block_gets_its_output(images):
    model = build()
    outs, maps = outputs_of(model, ['layers.2.blocks.1', 'layers.2.blocks.0'], images)
    expected, _ = outputs_of(Published(model), ['layers.2.blocks.1', 'layers.2.blocks.0'], images)
    for name, calls in outs.items():
        assert len(calls) == 1 and isinstance(calls[0], torch.Tensor)
        assert_same(calls, expected[name])
    assert_same(maps, model(images))


def scale(module, values):
    return tuple(2 * value for value in values)


@pytest.mark.parametrize('name', ['layers.1.blocks.0.op.act', 'layers.1.blocks.0.mlp.act', 'patch_embed.4'])
@pytest.mark.parametrize('how', ['hook', 'pre-hook', 'patch'])
def test_what_is_done_to_an_activation_takes_effect(name, how, images):
    model = build()
    results = []
    for changed in (model, Published(model)):
        act = changed.get_submodule(name)
        if how == 'hook':
            act.register_forward_hook(lambda module, values, out: 2 * out)
        elif how == 'pre-hook':
            act.register_forward_pre_hook(scale)
        else:
            act.forward = lambda x: x.clamp(min=-0.1)
        results.append(changed(images))
    assert_same(*results)
    assert not torch.allclose(results[0][-1], build()(images)[-1], rtol=1e-2)


def test_global_hooks_see_every_call(images):
    model = build()
    kinds = (nn.Linear, nn.Conv2d, nn.GELU, nn.SiLU, nn.LayerNorm, nn.Dropout)
    counts = []
    for counted in (model, Published(model)):
        names, seen = {module: name for name, module in counted.named_modules()}, []
        handle = register_module_forward_hook(lambda module, *_, names=names, seen=seen: seen.append(names.get(module)))
        counted(images)
        handle.remove()
        seen = [name for name in seen if name and isinstance(counted.get_submodule(name), kinds)]
        counts.append(seen)
    assert counts[0] == counts[1] and len(counts[0]) > 70


# ---- checkpointing --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', ['layers.2', 'layers.2.blocks.0', 'layers.2.blocks.1', 'patch_embed'])
def test_mmengine_checkpoints_by_name(name, images):
    model = build().train()
    expected = gradients(model, images)
    runs = []
    inner = model.get_submodule(
        name if name == 'patch_embed' else f'{name}{"" if "blocks" in name else ".blocks.0"}.op'
    )
    inner = inner[0] if name == 'patch_embed' else inner.in_proj
    handle = inner.register_forward_hook(lambda *_: runs.append(1))
    gradients(model, images)
    assert len(runs) == 1
    turn_on_activation_checkpointing(nn.ModuleDict(dict(backbone=model)), [f'backbone.{name}'])
    assert_same(gradients(model, images), expected, atol=1e-7)
    assert len(runs) == 3
    handle.remove()
    assert_same(gradients(model, images), expected, atol=1e-7)


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_checkpoint_wrappers_around_blocks(use_reentrant, images):
    model = build().train()
    expected = gradients(model, images)
    for stage in model.layers:
        for i, block in enumerate(stage.blocks):
            stage.blocks[i] = Recomputed(block, use_reentrant)
    assert_same(gradients(model, images), expected, atol=1e-7)


@pytest.mark.parametrize('place', ['', 'layers.2.blocks.1', 'layers.2.blocks.1.norm2', 'layers.2.blocks.1.mlp.act'])
@pytest.mark.parametrize('when', ['forward', 'backward'])
def test_a_checkpointed_block_takes_hooks_that_come_or_go_before_backward(place, when, images):
    model = VSSMBackbone(ARCH, with_cp=True).train()
    expected = gradients(model, images)
    model.zero_grad()
    with contextlib.ExitStack() as hooks:
        register = model.get_submodule(place).register_forward_hook if place else register_module_forward_hook
        if when == 'backward':
            loss = sum(out.square().mean() for out in model(images))
        hooks.callback(register(lambda *_: None).remove)
        if when == 'forward':
            loss = sum(out.square().mean() for out in model(images))
            hooks.close()
        loss.backward()
    assert_same([parameter.grad for parameter in model.parameters()], expected)


def test_a_checkpointed_block_stays_on_its_backend(images):
    model = VSSMBackbone(ARCH, with_cp=True).train()
    with use_backend('naive'):
        expected = gradients(model, images)
        loss = sum(out.square().mean() for out in model(images))
    model.zero_grad()
    loss.backward()
    assert_same([parameter.grad for parameter in model.parameters()], expected)


# ---- replaced parts -------------------------------------------------------------------------------------------------
def torch_conv(conv):
    new = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    new.load_state_dict(
        dict(conv.state_dict(), bias=torch.zeros(conv.out_channels) if conv.bias is None else conv.bias)
    )
    return new


@pytest.mark.parametrize('with_cp', [False, True])
def test_replaced_parts(with_cp, images):
    torch.manual_seed(0)
    model = VSSMBackbone(ARCH, with_cp=with_cp).train()
    reference = Published(model)
    group_norm = nn.GroupNorm(2, 32)
    for changed in (model, reference):
        blocks = changed.layers[2].blocks
        blocks[0].norm2, blocks[0].drop_path = copy.deepcopy(group_norm), nn.Identity()
        blocks[0].op.conv2d = torch_conv(blocks[0].op.conv2d)
        blocks[1] = Around(blocks[1])
        changed.layers[1].blocks[0] = nn.Identity()
        changed.patch_embed[5] = torch_conv(changed.patch_embed[5])
    model.layers[0].blocks[0].norm2 = nn.LayerNorm(8)  # torch's own, in the reference too
    assert_same(model(images), reference(images))


def test_other_strides_of_a_convolution(images):
    """Segmentation dilates the last stages in place, without another layer."""
    model = build()
    reference = Published(model)
    for changed in (model, reference):
        changed.layers[2].downsample[1].stride = (1, 1)
        conv = changed.layers[3].blocks[0].op.conv2d
        conv.dilation, conv.padding = (2, 2), (2, 2)
    assert_same(model(images), reference(images))


@pytest.fixture
def process_group():
    """A group of this process alone."""
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('implementation', ['torch', 'mmcv'])
def test_synchronised_batch_norms(implementation, images, process_group):
    model = build(norm_layer='bn')
    expected = [out.detach() for out in model(images)]
    converted = convert_sync_batchnorm(model, implementation).eval()
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    assert_same(converted(images), expected)
    assert_same(revert_sync_batchnorm(converted)(images), expected)


@pytest.mark.parametrize('name', ['patch_embed.0', 'patch_embed.5', 'layers.0.downsample.1'])
def test_lora_on_a_convolution_merges(name, images):
    model = build()
    plain = model(images)[-1]
    parent, _, place = name.rpartition('.')
    parent, conv = model.get_submodule(parent), model.get_submodule(name)
    setattr(parent, place, LoRA(conv))
    adapter = model.get_submodule(name)
    assert type(adapter.down) is nn.Conv2d
    adapted = model(images)
    assert not torch.allclose(adapted[-1], plain, rtol=1e-2)
    with torch.no_grad():
        conv.weight += torch.einsum('or,rikl->oikl', adapter.up.weight[:, :, 0, 0], adapter.down.weight)
    setattr(parent, place, conv)
    assert_same(model(images), adapted, atol=1e-4)


# ---- tools ----------------------------------------------------------------------------------------------------------
def cam(model, x):
    """Grad-CAM on the last norm: its activations (B, C, h, w), weighted by the mean of their gradient."""
    outs, maps = outputs_of(model, ['outnorm3'], x)
    (activations,) = outs['outnorm3']
    (gradient,) = torch.autograd.grad(maps[3].mean(dim=(2, 3))[:, 5].sum(), activations)
    return (gradient.mean(dim=(2, 3), keepdim=True) * activations).sum(dim=1).relu()


def test_cam_on_the_last_norm():
    """A hooked norm is called, and gives what the backbone returns."""
    model, x = build(), torch.randn(1, 3, 160, 224)
    model.outnorm3.weight.requires_grad_()
    assert_same([cam(model, x)], [cam(Published(model), x)], atol=1e-6)


def count_by_hooks(model, x):
    """Multiplications of convolutions and linear layers by the shapes that hooks get, as thop and ptflops count."""
    total = 0

    def count(module, inputs, out):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            channels = out.shape[1]
            assert channels == module.out_channels
            total += out.numel() * module.weight[0].numel()
        else:
            total += out.numel() * module.in_features

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(x)
    return total


def test_multiplications_counted_by_hooks(images):
    model = build()
    assert count_by_hooks(copy.deepcopy(model), images) == count_by_hooks(Published(model), images) > 0


class Offloaded:
    """Keeps a module's own weights elsewhere and brings them for its call, in a ``forward`` of its own."""

    def __init__(self, module):
        self.module, self.forward = module, module.forward
        self.weights = dict(module.named_parameters(recurse=False))
        self.set(lambda weight: nn.Parameter(weight.to('meta')))
        module.forward = self.call

    def set(self, place):
        for name, weight in self.weights.items():
            setattr(self.module, name, place(weight))

    def call(self, x):
        self.set(lambda weight: weight)
        out = self.forward(x)
        self.set(lambda weight: nn.Parameter(weight.to('meta')))
        return out


@pytest.mark.parametrize(
    'device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))]
)
def test_offloaded_weights(device, images):
    model, x = build().to(device), images.detach().to(device)
    with torch.no_grad():
        expected = model(x)
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                Offloaded(module)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert_same(model(x), expected)


# ---- stages that nothing uses ---------------------------------------------------------------------------------------
def test_every_parameter_has_a_gradient_without_the_last_stages(images):
    model = VSSMBackbone(ARCH, out_indices=(0, 1)).train()
    assert len(model.layers) == 2 and isinstance(model.layers[1].downsample, nn.Identity)
    assert all(gradient is not None for gradient in gradients(model, images))


def test_data_parallel_without_the_last_stages(images, process_group):
    model = nn.parallel.DistributedDataParallel(VSSMBackbone(ARCH, out_indices=(0, 1)).train())
    for _ in range(3):
        gradients(model, images)

"""Whatever people do to a module of the backbone means the same as in the published structure, which fuses nothing."""

import pytest
import torch
from hypothesis import note
from hypothesis import strategies as st
from torch.utils.checkpoint import set_checkpoint_early_stop

from mmvmamba import VSSMBackbone
from tests.cases import cases
from tests.test_models.interventions import INTERVENTIONS, duplicate, intervention, places
from tests.test_models.published import Published

GPU = torch.cuda.is_available()
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not GPU, reason='needs a GPU'))]
OPTIONS = dict(
    norm_layer=('ln2d', 'ln', 'bn'),
    stem=('conv3x2', 'patch4'),
    downsample=('conv3', 'conv2', 'merge'),
    scan_mode=('cross2d', 'unidi', 'bidi', 'cascade2d'),
    gate=('none', 'silu', 'linear'),
    out_norm=('ln', 'none', 'dwconv3', 'cnorm', 'softmax', 'sigmoid'),
    out_act=(False, True),
    act=('silu', 'gelu'),
    mlp=('mlp', 'gmlp'),
    mlp_ratio=(2.0, 0.0),
    mlp_act=('gelu', 'relu'),
    d_conv=(3, 1),
    conv_bias=(False, True),
    ssm_ratio=(1.0, 2.0, 0.0),
    post_norm=(False, True),
    patch_norm=(True, False),
    patch_size=(4, 8),
    pos_embed=(False, True),
)

COMPILED = (
    'nothing',
    'changing_forward_hook',
    'changing_forward_pre_hook',
    'patched_forward',
    'wrapper',
    'identity',
    'lora',
    'weight_norm',
    *(pytest.param(name, marks=pytest.mark.slow) for name in ('forward_hook', 'checkpoint_wrapper', 'spectral_norm')),
)


def build(options, training, dtype, device, with_cp=False):
    torch.manual_seed(0)
    arch = dict(dims=8, depths=(1, 2), **options)
    model = VSSMBackbone(arch, out_indices=(0, 1), with_cp=with_cp).train(training)
    for parameter in model.parameters():  # biases and scales too
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model.to(device, dtype)


def run(model, x):
    """Maps, and gradients of the image and of every parameter by name."""
    x = x.clone().requires_grad_()
    outs = model(x * 1)  # what is no leaf may be changed in place
    loss = sum((out * torch.linspace(-1, 1, out.numel(), device=x.device).view_as(out)).sum() for out in outs)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return [*(out.detach() for out in outs), x.grad, *(gradients[name] for name in sorted(gradients))]


def assert_same(values, expected, limit):
    assert len(values) == len(expected)
    for value, reference in zip(values, expected):
        if value is None or reference is None or isinstance(value, str):
            assert value == reference
        else:
            assert value.shape == reference.shape
            assert (value - reference).abs().max() <= limit * (1 + reference.abs().max())


def check(name, place, choices, training, device, copied='no', with_cp=False, double=False, compiled=False):
    # float32 is what the kernels are for; float64 tells what is the same
    dtype = torch.float64 if double and device == 'cpu' else torch.float32
    ours = build(choices, training, dtype, device, with_cp)
    theirs = Published(ours)
    paths = places(name, theirs)
    assert set(paths) <= set(dict(ours.named_modules()))
    path = paths[place % len(paths)]
    x = torch.randn(2, 3, 20, 12, device=device, dtype=dtype)
    ours = duplicate(ours, copied)
    results, seen = [], ([], [])
    for model, record in zip((theirs, ours), seen):
        torch.manual_seed(1)  # of what adapters draw
        try:
            # early stopping would leave out the last calls of a recomputation, which are not the same in both
            with set_checkpoint_early_stop(False), intervention(name, model, path, record):
                results.append(run(torch.compile(model, backend='eager') if compiled and model is ours else model, x))
        except RuntimeError as error:  # some of torch's layers keep what they give, such as a ReLU
            if model is ours or 'in_place' not in name or 'inplace' not in str(error):
                raise
            return
    limit = 1e-8 if double and device == 'cpu' else 2e-3
    assert_same(*results, limit)
    if record and isinstance(record[0], str):  # backward may reach two branches in either order
        seen = [sorted(record) for record in seen]
    assert_same(*seen, limit)
    assert bool(seen[0]) == ('hook' in name and 'changing' not in name and 'weight' not in name)


NAMES = sorted(INTERVENTIONS)
CASE = st.fixed_dictionaries(
    dict(
        place=st.integers(0, 200),
        choices=st.dictionaries(st.sampled_from(sorted(OPTIONS)), st.integers(0, 5), max_size=4),
        training=st.booleans(),
        copied=st.sampled_from(['no', 'no', 'no', 'deepcopy', 'pickle', 'saved']),
        with_cp=st.sampled_from([False, False, False, True]),
        double=st.booleans(),
    )
)
# a draw tries every intervention: names that are drawn leave some out
DRAWN = dict(each=len(NAMES), drawn=st.lists(CASE, min_size=len(NAMES), max_size=len(NAMES)))


def check_drawn(drawn, device):
    for name, case in zip(NAMES, drawn, strict=True):
        note(f'{name}: {case}')
        choices = {option: OPTIONS[option][i % len(OPTIONS[option])] for option, i in case['choices'].items()}
        if choices.get('ssm_ratio') == 0:
            choices.pop('mlp_ratio', None)  # without both branches nothing is left of a block
        check(name, device=device, **{**case, 'choices': choices})


@pytest.mark.filterwarnings('ignore:.*weight_norm')
@cases(quick=300, full=5000, **DRAWN)
def test_interventions(drawn):
    check_drawn(drawn, 'cpu')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@cases(quick=300, full=5000, **DRAWN)
def test_interventions_on_the_gpu(drawn):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check_drawn(drawn, 'cuda')


def test_calls_of_a_module_come_in_order():
    """The activation of SS2D is called for the gate, then for the map, by a hook that sees both."""
    model = Published(build(dict(gate='silu'), True, torch.float32, 'cpu'))
    for name in ('forward_hook', 'forward_pre_hook', 'hook_of_forward_alone'):
        place = places(name, model).index('layers.1.blocks.0.op.act')
        check(name, place, dict(gate='silu'), True, 'cpu')


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', COMPILED)
def test_interventions_before_compiling(name, device):
    torch._dynamo.reset()
    for place in (3, 30):
        check(name, place, {}, True, device, compiled=True)
    torch._dynamo.reset()

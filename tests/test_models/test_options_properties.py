"""Any options of the backbone and any command line: a model or a run, or one documented error that names the option."""

import io
import re
import string
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy

import pytest
import torch
from hypothesis import strategies as st
from mmengine.config import Config

from mmvmamba.cli import UserError
from mmvmamba.cli.models import CODEBASES
from mmvmamba.layers.options import CHOICES, SS2DOptions
from mmvmamba.models import ARCHS, MM_VSSM, VSSMBackbone, parse_forward_type
from mmvmamba.models.archs import Arch, build_arch
from tests.cases import attempt, cases
from tests.test_tools.conftest import ROOT, load_tool

OPTIONS = {
    **{name: st.sampled_from(values) for name, values in CHOICES.items()},
    'd_state': st.integers(1, 3),
    'ssm_ratio': st.sampled_from((0.5, 1.0, 2, 0.01)),
    'dt_rank': st.sampled_from(('auto', 1, 2)),
    'd_conv': st.sampled_from((1, 3, 5)),
    'conv_bias': st.booleans(),
    'dropout': st.sampled_from((0.0, 0.5, 1)),
    'out_act': st.booleans(),
    'force_fp32': st.booleans(),
    'in_channels': st.integers(1, 3),
    'mlp_ratio': st.sampled_from((0, 0.001, 0.5, 2.0)),
    'mlp_dropout': st.sampled_from((0.0, 0.3)),
    'drop_path_rate': st.sampled_from((0.0, 0.5)),
}
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(min_value=300, max_value=2**70),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.integers(-1, 2), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.sampled_from((float('nan'), float('inf'), b'ln', object(), (), torch.ones(1), [[]])),
)


@cases(
    quick=12,
    full=300,
    dims=st.one_of(st.sampled_from((8, 16)), st.just((8, 12))),
    options=st.fixed_dictionaries({}, optional=OPTIONS),
    size=st.tuples(st.integers(4, 20), st.integers(4, 20)),
)
def test_any_valid_options_make_a_model_that_trains(dims, options, size):
    arch = dict(options, dims=dims, depths=(1, 1))
    model, message = attempt(lambda: VSSMBackbone(arch, out_indices=(0, 1)), ValueError)
    if message:  # two options that leave nothing, or that exclude each other
        assert 'which leaves no channel' in message or "for core 'ssd'" in message
        return
    outs = model(torch.rand(2, model.arch.in_channels, *size))
    sum(out.square().mean() for out in outs).backward()
    # softmax over one pixel and a full dropout have no gradient to give, but none may be missing or bad
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(out.isfinite().all() for out in outs)


def is_valid(name, value):
    """Whether a value is a documented one; what ``build_arch`` accepts must be."""
    if name in CHOICES:
        return isinstance(value, str) and value in CHOICES[name]
    if name == 'dt_rank' and isinstance(value, str):
        return value == 'auto'
    kind = {**SS2DOptions.__annotations__, **Arch.__annotations__}.get(name)
    if kind is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float)) if kind is float else isinstance(value, (int, tuple, list))


@cases(quick=100, full=1500, name=st.sampled_from((*OPTIONS, 'dims', 'depths', 'typo', '', 7, None)), value=JUNK)
def test_a_junk_option_is_accepted_only_where_documented(name, value):
    arch = {**dict(dims=8, depths=(1, 1)), name: value}
    built, message = attempt(lambda: build_arch(arch), TypeError, ValueError)
    if message is None:
        assert is_valid(name, value), f'{name}={value!r} was accepted'
        assert built.depths and len(built.dims) == len(built.depths)
    else:
        assert str(name) in message


@cases(
    quick=80,
    full=600,
    name=st.sampled_from(('arch', 'out_indices', 'drop_path_rate', 'frozen_stages', 'with_cp', 'norm_eval')),
    value=JUNK,
)
def test_a_junk_argument_of_the_backbone_is_named(name, value):
    arguments = {**dict(arch=dict(dims=8, depths=(1, 1)), out_indices=(1,)), name: value}
    _, message = attempt(lambda: VSSMBackbone(**arguments), TypeError, ValueError)
    assert message is None or name in message, message


_PUBLISHED = (
    'norm_layer',
    'ssm_d_state',
    'ssm_ratio',
    'ssm_dt_rank',
    'ssm_act_layer',
    'ssm_conv',
    'ssm_conv_bias',
    'ssm_drop_rate',
    'ssm_init',
    'forward_type',
    'mlp_ratio',
    'mlp_act_layer',
    'mlp_drop_rate',
    'gmlp',
    'drop_path_rate',
    'downsample_version',
    'patchembed_version',
    'use_checkpoint',
    'patch_size',
    'in_chans',
    'patch_norm',
    'posembed',
    'depths',
    'dims',
)


@cases(quick=80, full=600, name=st.sampled_from(_PUBLISHED), value=JUNK)
def test_a_junk_argument_under_its_published_name(name, value):
    if name == 'in_chans' and isinstance(value, int) and value > 300:
        return  # a valid stem of any size
    arguments = {**dict(dims=8, depths=(1, 1), out_indices=(1,)), name: value}
    with torch.device('meta'):
        _, message = attempt(lambda: MM_VSSM(**arguments), TypeError, ValueError)
    assert message is None or re.search(r"^\w+(\[\d+\])? (is|has|and) |no '?\w+", message), message


@cases(
    quick=100,
    full=1000,
    parts=st.lists(
        st.sampled_from(
            (
                'v0',
                'v01',
                'v05',
                'v052dc',
                'v2',
                'v3',
                'no32',
                'noz',
                'nozact',
                'oact',
                'onnone',
                'onsoftmax',
                '',
                'v9',
                'x',
            )
        ),
        max_size=5,
    ),
)
def test_forward_type_means_the_same_in_any_order(parts):
    text = '_'.join(parts)
    options, message = attempt(lambda: parse_forward_type(text), ValueError)
    if message is None:
        version, *postfixes = text.split('_')
        assert parse_forward_type('_'.join([version, *reversed(postfixes)])) == options
    else:
        assert repr(text) in message


@cases(quick=60, full=500, text=st.text(alphabet=string.ascii_letters + '_0123', max_size=12))
def test_any_forward_type(text):
    _, message = attempt(lambda: build_arch(dict(dims=8, depths=(1,), **parse_forward_type(text))), ValueError)
    assert message is None or repr(text) in message


@cases(quick=60, full=300, name=st.text(max_size=20))
def test_any_arch_name(name):
    if name not in ARCHS:
        with pytest.raises(ValueError, match=r'arch is .* expected one of'):
            VSSMBackbone(name)


# ---- command lines --------------------------------------------------------------------------------------------------
PATH = ROOT / 'configs/demo/vmamba-nano_1xb64_digits-32px.py'
CONFIG, LOADED = PATH.read_text(), Config.fromfile(PATH)
_CONFIGS = ('good.py', 'broken.py', 'folder', 'missing.py', '', 'noext', 'data.json', '\0')
# settings of the config, and what each may be
SETTINGS = {
    **dict.fromkeys(('model', 'train_dataloader', 'test_dataloader', 'optim_wrapper', 'auto_scale_lr'), (dict,)),
    **dict.fromkeys(('train_cfg', 'test_cfg', 'default_hooks', 'visualizer', 'tta_model'), (dict,)),
    **dict.fromkeys(('default_hooks.checkpoint', 'default_hooks.visualization', 'default_hooks.mine'), (dict,)),
    **dict.fromkeys(('custom_hooks', 'tta_pipeline', 'test_dataloader.dataset.pipeline'), (list,)),
    **dict.fromkeys(('test_evaluator', 'param_scheduler'), (dict, list)),
    **dict.fromkeys(('load_from', 'work_dir'), (str,)),
    'resume': (bool,),
}
VALUES = {'3': 3, 'None': None, '[1]': [1], 'abc': 'abc', 'True': True}
FLAGS = {
    'train.py': ('--amp', '--auto-scale-lr', '--resume', '--no-validate'),
    'test.py': ('--amp', '--tta', '--show-dir=x', '--out=out.pkl'),
}
NEEDED = {
    'train.py': ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper'),
    'test.py': ('model', 'test_dataloader', 'test_cfg', 'test_evaluator'),
}
_ASSIGNED = st.tuples(st.sampled_from(tuple(SETTINGS)), st.sampled_from(tuple(VALUES)))
_WORDS = st.one_of(
    st.sampled_from(
        (
            '--work-dir',
            '--amp',
            '--resume',
            '--tta',
            '--show-dir',
            '--out',
            '--cfg-options',
            '--launcher',
            'none',
            'x=1',
            'model.backbone=3',
            'model=',
            '=',
            'a.b.c.d=[1',
            'default_scope=mmpretrain',
            'train_cfg.max_epochs=-1',
            '-h',
            'train_dataloader=None',
            'test_dataloader=None',
            'model.backbone.arch=nothing',
            'out.pkl',
            'out.txt',
            'optim_wrapper.optimizer.lr=1e400',
            '--local_rank=x',
            '--no-validate',
            '--auto-scale-lr',
        )
    ),
    st.text(max_size=8).filter(lambda text: '\0' not in text),
)


@pytest.fixture(scope='module', autouse=True)
def _user_folder(tmp_path_factory):
    """A folder with the data that the demo's config names; the current one while a command line is prepared."""
    global FOLDER
    FOLDER = tmp_path_factory.mktemp('user')
    (FOLDER / 'data/digits/classification').mkdir(parents=True)
    (FOLDER / 'folder').mkdir()
    (FOLDER / 'data.json').write_text('{"default_scope": "mmdet"}')
    (FOLDER / 'broken.py').write_text('model = dict(\n')
    (FOLDER / 'noext').write_text(CONFIG)


def prepare(tool, config, words) -> tuple:
    """The config, or what is printed instead: an error, or nothing for the usage."""
    module, output = load_tool(tool), io.StringIO()
    arguments = [config, *(['noext'] if tool == 'test.py' else []), *words]
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(output), redirect_stdout(io.StringIO()):
        patch.chdir(FOLDER)
        cfg, message = attempt(lambda: module.prepare_config(module.parse_args(arguments)), SystemExit, UserError)
    if message == '2':  # from argparse, which prints the usage first
        message = output.getvalue().partition(': error: ')[2]
        assert message, output.getvalue()
    return cfg, message


def names(message, words) -> bool:
    """Whether a message names one of these options, settings or values, or a setting that mmengine knows."""
    if message.startswith('unrecognized arguments: '):  # argparse names them, even if they are blank
        return True
    known = {word.partition('=')[0] for word in words} | {part for word in words for part in (word, repr(word))}
    return any(re.search(rf'(?<!\w){re.escape(name)}(?!\w)', message) for name in {*known, *SETTINGS} if name)


@cases(
    quick=40,
    full=1000,
    tool=st.sampled_from(tuple(FLAGS)),
    config=st.sampled_from(_CONFIGS),
    words=st.lists(_WORDS, max_size=5),
    assigned=st.lists(_ASSIGNED, max_size=2),
    edits=st.lists(st.tuples(st.integers(0, len(CONFIG) - 1), st.sampled_from('(){}[]=,\'" \nx0')), max_size=2),
)
def test_any_command_line_is_prepared_or_refused(tool, config, words, assigned, edits):
    text = list(CONFIG)
    for place, character in edits:
        text[place] = character
    (FOLDER / 'good.py').write_text(''.join(text))
    if assigned:
        words = [*words, '--cfg-options', *map('='.join, assigned)]
    cfg, message = prepare(tool, config, words)
    if message is None:
        assert cfg.default_scope in CODEBASES and all(isinstance(cfg[key], dict) for key in NEEDED[tool][:3])
    else:
        assert message == '0' or names(message, [config, *words]), message


@cases(
    quick=200,
    full=2000,
    tool=st.sampled_from(tuple(FLAGS)),
    assigned=_ASSIGNED,
    flags=st.sets(st.integers(0, 3)),
)
def test_a_setting_of_another_type_is_named(tool, assigned, flags):
    (key, text), words = assigned, [FLAGS[tool][flag] for flag in flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, 'fromfile', lambda _: deepcopy(LOADED))  # which takes most of the time
        _, message = prepare(tool, 'noext', [*words, '--cfg-options', f'{key}={text}'])
    if message is not None:
        # an option may need a setting that the config does not have, whatever it is set to
        assert re.search(rf'(?<!\w){re.escape(key)}(?!\w)', message) or names_missing(message, words), message
    elif VALUES[text] is None:
        assert key not in NEEDED[tool]
    elif key != 'test_dataloader.dataset.pipeline' or '--tta' in words:  # else the data set's own business
        assert isinstance(VALUES[text], SETTINGS[key]), f'{key}={text} was prepared'


def names_missing(message, words) -> bool:
    """Whether a message says that the config lacks what one of these options needs."""
    return 'the config has no ' in message and any(word.partition('=')[0] in message for word in words)

"""Any bytes as a checkpoint: the weights that were saved, or one documented error and an untouched model."""

import io
import pickle

import pytest
import torch
from hypothesis import strategies as st

from mmvmamba.checkpoint import CheckpointError, is_state, load_pretrained, read_checkpoint, select_weights
from mmvmamba.models import VSSMBackbone
from tests.cases import attempt, cases
from tests.test_tools.conftest import load_tool
from tests.test_training.toy import Writes


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('checkpoints')


def backbone():
    return VSSMBackbone(dict(dims=4, depths=(1,), mlp_ratio=0), out_indices=(0,))


def saved(legacy=False):
    torch.manual_seed(1)
    state, buffer = backbone().state_dict(), io.BytesIO()
    torch.save({'state_dict': state, 'meta': {'epoch': 3}}, buffer, _use_new_zipfile_serialization=not legacy)
    return state, buffer.getvalue()


STATE, CONTENT = saved()
LEGACY = saved(legacy=True)[1]
EDIT = st.tuples(st.integers(0, 10**6), st.integers(1, 255))


def load(content, path):
    """Load into a fresh model: its state if that worked, else the message; nothing may change then."""
    path.write_bytes(content)
    torch.manual_seed(2)
    model = backbone()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    _, message = attempt(lambda: load_pretrained(model, init_cfg), CheckpointError)
    if message is not None:
        assert path.name in message
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return None
    return model.state_dict()


def is_the_saved_one(state):
    return all(torch.equal(value, STATE[name]) for name, value in state.items())


@pytest.fixture(scope='module', autouse=True)
def _path(folder):
    """Where the file lies."""
    global PATH
    PATH = folder / 'weights.pth'


def test_whole(folder):
    assert is_the_saved_one(load(CONTENT, PATH)) and is_the_saved_one(load(LEGACY, PATH))


@cases(quick=60, full=600, edits=st.lists(EDIT, min_size=1, max_size=6))
def test_edited_bytes(edits):
    content = bytearray(CONTENT)
    for place, change in edits:
        content[place % len(content)] ^= change
    state = load(bytes(content), PATH)
    assert state is None or is_the_saved_one(state)


def places(signature):
    """Where a structure of the zip format begins."""
    return [place for place in range(len(CONTENT)) if CONTENT.startswith(signature, place)]


def flipped(place, bit):
    content = bytearray(CONTENT)
    content[place] ^= 1 << bit
    return bytes(content)


@pytest.mark.parametrize('record', [0, 4, 10])
def test_a_record_that_one_flipped_bit_marks_as_a_folder(record):
    """torch's reader skips folders: it would take what the memory held before for the weights."""
    assert load(flipped(places(b'PK\x01\x02')[record] + 38, 4), PATH) is None


@pytest.mark.parametrize('bit', range(8))
def test_a_flipped_number_of_disks(bit):
    """Python's reader raises when it is only asked whether this is a zip file."""
    (end,) = places(b'PK\x06\x07')
    for place in range(4, 20):
        state = load(flipped(end + place, bit), PATH)
        assert state is None or is_the_saved_one(state)


@pytest.mark.slow
def test_every_flipped_bit():
    """Each of the 75,000: the weights that were saved or an error; most are found without a model to load into."""
    loaded = 0
    for place in range(len(CONTENT)):
        for bit in range(8):
            PATH.write_bytes(flipped(place, bit))
            content, _ = attempt(lambda: read_checkpoint(str(PATH)), CheckpointError)
            if content is not None:
                loaded += 1
                assert content['state_dict'].keys() == STATE.keys(), (place, bit)
                assert is_the_saved_one(content['state_dict']) and content['meta'] == {'epoch': 3}, (place, bit)
    assert 0 < loaded < 4 * len(CONTENT)  # bits that no reader looks at, such as those between records


@cases(quick=30, full=300, length=st.integers(0, len(CONTENT) - 1), tail=st.binary(max_size=30), legacy=st.booleans())
def test_cut_and_continued(length, tail, legacy):
    state = load((LEGACY if legacy else CONTENT)[:length] + tail, PATH)
    # the last bytes of the old format lie behind the numbers
    assert state is None or is_the_saved_one(state)


@cases(quick=40, full=400, content=st.binary(max_size=300), prefix=st.sampled_from((b'', b'PK\x03\x04', b'\x80\x02')))
def test_random_bytes(content, prefix):
    assert load(prefix + content, PATH) is None


LEAF = st.one_of(
    st.none(), st.integers(), st.floats(), st.text(max_size=5), st.booleans(),
    st.sampled_from((torch.ones(2), torch.ones(1, dtype=torch.int64), torch.ones(2, 2).to_sparse(), torch.tensor(1j))),
)  # fmt: skip
KEY = st.one_of(
    st.sampled_from(
        ('model', 'model_ema', 'state_dict', 'max_accuracy_ema', 'module.x', 'layers.0.x', 'backbone.', 'a')
    ),
    st.sampled_from(tuple(STATE)),
    st.integers(0, 3),
    st.text(max_size=4),
)
TREE = st.recursive(
    LEAF, lambda inner: st.dictionaries(KEY, inner, max_size=4) | st.lists(inner, max_size=2), max_leaves=9
)


@cases(quick=60, full=600, tree=TREE)
def test_any_content(tree):
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    assert load(buffer.getvalue(), PATH) is None


@cases(quick=60, full=600, tree=TREE, weights=st.sampled_from(('averaged', 'raw')))
def test_any_content_in_the_converters(tree, weights):
    for convert in (
        lambda: load_tool('model_converters/vmamba2mm.py').to_mm(tree, 'weights.pth'),
        lambda: load_tool('model_converters/mm2vmamba.py').to_official(tree, 'weights.pth'),
        lambda: load_tool('model_converters/publish_model.py').reduce_checkpoint(tree, weights),
    ):
        converted, message = attempt(convert, CheckpointError)
        assert message or all(is_state(converted[key]) for key in converted if key in ('model', 'state_dict'))


@cases(
    quick=30,
    full=100,
    name=st.sampled_from(tuple(STATE)),
    kind=st.sampled_from(('drop', 'shape', 'type', 'sparse', 'more')),
)
def test_one_wrong_weight(name, kind):
    state = dict(STATE)
    value = state.pop(name)
    if kind == 'shape':
        state[name] = torch.cat([value, value])
    elif kind == 'type':
        state[name] = value.to(torch.complex64)
    elif kind == 'sparse':
        state[name] = value.to_sparse()
    elif kind == 'more':
        state.update({name: value, name + '_more': value})
    buffer = io.BytesIO()
    torch.save({'state_dict': state}, buffer)
    loaded = load(buffer.getvalue(), PATH)
    # a norm of the outputs may be missing: a task starts it anew
    assert loaded is None or name.startswith('outnorm')


@pytest.mark.parametrize('place', ['alone', 'beside the weights', 'as a weight'])
@pytest.mark.parametrize('plain_pickle', [False, True], ids=['torch.save', 'pickle'])
def test_a_pickle_that_writes_a_file_does_nothing(folder, place, plain_pickle):
    trace = folder / 'trace'
    evil = Writes(trace)
    content = {
        'alone': evil,
        'beside the weights': {'state_dict': STATE, 'meta': evil},
        'as a weight': {'state_dict': {**STATE, 'patch_embed.0.weight': evil}},
    }[place]
    buffer = io.BytesIO()
    pickle.dump(content, buffer) if plain_pickle else torch.save(content, buffer)
    assert load(buffer.getvalue(), PATH) is None
    assert not trace.exists()


@pytest.mark.parametrize('keys', [(1, 'a'), (b'model',), (None,)], ids=str)
def test_keys_that_are_no_names(keys):
    with pytest.raises(CheckpointError, match='expected weights under one of model, state_dict'):
        select_weights({key: torch.ones(1) for key in keys}, 'weights.pth')

"""What people do to a module of a model; each is done to the backbone and to its unfused reference."""

import contextlib
import copy
import io
import pickle

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

TYPES = (nn.Linear, nn.Conv2d, nn.GELU, nn.SiLU, nn.Dropout, nn.BatchNorm2d, nn.LayerNorm)


class Wrapper(nn.Module):
    """Gives the attributes of what it wraps, as torch's own wrappers do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('inner'), name)


class Around(Wrapper):
    """An adapter."""

    def forward(self, x):
        return 1.5 * self.inner(x)


class Recomputed(Wrapper):
    """A checkpoint wrapper."""

    def __init__(self, inner, use_reentrant):
        super().__init__(inner)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


class LoRA(nn.Module):
    """A low-rank adapter, which rebuilds a layer by its type as peft does."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        if isinstance(base, nn.Conv2d):
            self.down = type(base)(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False)
            self.up = type(base)(2, base.out_channels, (1, 1), (1, 1), bias=False)
        else:
            self.down = type(base)(base.in_features, 2, bias=False)
            self.up = type(base)(2, base.out_features, bias=False)
        self.to(base.weight.device, base.weight.dtype)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def tensor_of(value):
    return value[0] if isinstance(value, tuple) else value


def replace(model, path, new):
    parent, _, name = path.rpartition('.')
    setattr(model.get_submodule(parent), name, new)


def is_layer(module):
    return isinstance(module, (nn.Linear, nn.Conv2d))


def anything(module):
    return True


def keeps_shape(path, module):
    """Whether an Identity fits in the place of a module."""
    name = path.rpartition('.')[2]
    if isinstance(module, nn.Linear):
        return module.in_features == module.out_features
    if isinstance(module, nn.Conv2d):
        return module.in_channels == module.out_channels and module.stride == (1, 1)
    is_stage = path.startswith('layers.') and name.isdigit() and path.count('.') == 1
    return name != 'patch_embed' and not is_stage and '.downsample' not in path


def observe(register):
    def intervene(model, path, module, seen):
        getattr(module, register)(lambda *values: seen.append(tensor_of(values[-1]).detach().clone()))

    return intervene


def change(register, scale):
    def intervene(model, path, module, seen):
        def hook(*values):
            value = values[-1]
            return tuple(v if v is None else v * scale for v in value) if isinstance(value, tuple) else value * scale

        getattr(module, register)(hook)

    return intervene


def observe_everywhere(register):
    """A global hook, which the test removes; what it counts are calls of torch's own layers."""

    def intervene(model, path, module, seen):
        names = {id(module): name for name, module in model.named_modules()}

        def hook(module, *_):
            if isinstance(module, TYPES) and id(module) in names:
                seen.append(names[id(module)])

        return getattr(hooks, register)(hook)

    return intervene


def patch_forward(model, path, module, seen):
    forward = module.forward
    module.forward = lambda x: 1.5 * forward(x)


def patch_class(model, path, module, seen):
    """The forward of all modules of a class of torch; the test takes it back."""
    kind, forward = type(module), type(module).forward
    kind.forward = lambda self, x: 1.5 * forward(self, x)
    return _Undo(lambda: setattr(kind, 'forward', forward))


def patch_call(model, path, module, seen):
    """The ``__call__`` of all modules, as tools that draw a model's graph do; the test takes it back."""
    names, call = {id(module): name for name, module in model.named_modules()}, nn.Module.__call__

    def recorded(self, *inputs, **options):
        if isinstance(self, TYPES) and id(self) in names:
            seen.append(names[id(self)])
        return call(self, *inputs, **options)

    nn.Module.__call__ = recorded
    return _Undo(lambda: setattr(nn.Module, '__call__', call))


def change_in_place(register):
    """Scale what a module gets or gives where it lies, as layers do that are ``inplace``."""

    def hook(*values):
        tensor_of(values[-1]).mul_(1.5)

    return lambda model, path, module, seen: getattr(module, register)(hook) and None


def observe_forward_alone(model, path, module, seen):
    """A hook that is gone before backward, where checkpointed modules are called again."""
    handle = module.register_forward_hook(lambda *values: seen.append(tensor_of(values[-1]).detach().clone()))
    model.register_forward_hook(lambda *_: handle.remove())


class Watching(TorchDispatchMode):
    """Names of the layers' ops, as counters of FLOPs get them."""

    OPS = ('convolution', 'native_layer_norm', 'gelu', 'silu', 'mm')

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__.removeprefix('add')  # a bias is another op for some layouts of a map
        if name in self.OPS:
            self.seen.append(name)
        return op(*args, **(kwargs or {}))


class Scaling(TorchFunctionMode):
    """Torch's functions replaced."""

    FUNCTIONS = (F.linear, F.gelu, F.silu, F.layer_norm, F.conv2d)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 1.5 * out if function in self.FUNCTIONS else out


def enter(mode):
    mode.__enter__()
    return _Undo(lambda: mode.__exit__(None, None, None))


class _Undo:
    def __init__(self, remove):
        self.remove = remove


def own_layer(model, path, module, seen):
    """Torch's own layer with the same weights; in the reference it is one already."""
    if isinstance(module, nn.LayerNorm):
        if type(module).__module__.startswith('tests.'):
            return
        new = nn.LayerNorm(module.normalized_shape)
    elif isinstance(module, nn.Conv2d):
        new = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            groups=module.groups,
            bias=module.bias is not None,
        )
    else:
        new = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    new.to(module.weight.device, module.weight.dtype).load_state_dict(module.state_dict())
    replace(model, path, new.train(module.training))


def wrap(wrapper, **options):
    return lambda model, path, module, seen: replace(model, path, wrapper(module, **options).train(module.training))


def reparametrise(function, **options):
    return lambda model, path, module, seen: function(module, 'weight', **options) and None


INTERVENTIONS = dict(
    nothing=(anything, lambda *_: None),
    forward_hook=(anything, observe('register_forward_hook')),
    forward_pre_hook=(anything, observe('register_forward_pre_hook')),
    backward_hook=(anything, observe('register_full_backward_hook')),
    backward_pre_hook=(anything, observe('register_full_backward_pre_hook')),
    changing_forward_hook=(anything, change('register_forward_hook', 1.5)),
    changing_forward_pre_hook=(anything, change('register_forward_pre_hook', 0.5)),
    changing_backward_hook=(
        anything,
        lambda model, path, module, seen: (
            module.register_full_backward_hook(
                lambda _, grads, __: tuple(None if grad is None else 3 * grad for grad in grads)
            )
            and None
        ),
    ),
    changing_backward_pre_hook=(anything, change('register_full_backward_pre_hook', 3.0)),
    global_forward_hook=(anything, observe_everywhere('register_module_forward_hook')),
    global_forward_pre_hook=(anything, observe_everywhere('register_module_forward_pre_hook')),
    global_backward_hook=(anything, observe_everywhere('register_module_full_backward_hook')),
    global_backward_pre_hook=(anything, observe_everywhere('register_module_full_backward_pre_hook')),
    patched_forward=(anything, patch_forward),
    patched_call_hook=(anything, patch_call),
    changing_input_in_place=(anything, change_in_place('register_forward_pre_hook')),
    changing_output_in_place=(anything, change_in_place('register_forward_hook')),
    hook_of_forward_alone=(anything, observe_forward_alone),
    hook_by_a_mode=(anything, lambda model, path, module, seen: enter(Watching(seen))),
    functions_by_a_mode=(anything, lambda *_: enter(Scaling())),
    patched_class=(lambda module: type(module) in TYPES[:5], patch_class),
    wrapper=(anything, wrap(Around)),
    checkpoint_wrapper=(anything, wrap(Recomputed, use_reentrant=False)),
    reentrant_wrapper=(anything, wrap(Recomputed, use_reentrant=True)),
    identity=(anything, lambda model, path, module, seen: replace(model, path, nn.Identity())),
    own_layer=(lambda module: isinstance(module, (nn.LayerNorm, nn.Conv2d, nn.Linear)), own_layer),
    lora=(lambda module: is_layer(module) and getattr(module, 'groups', 1) == 1, wrap(LoRA)),
    weight_norm=(is_layer, reparametrise(parametrizations.weight_norm)),
    hooked_weight_norm=(is_layer, reparametrise(nn.utils.weight_norm)),
    spectral_norm=(is_layer, reparametrise(parametrizations.spectral_norm)),
    no_bias=(
        lambda module: is_layer(module) or isinstance(module, nn.LayerNorm),
        lambda model, path, module, seen: setattr(module, 'bias', None),
    ),
    no_norm_weight=(
        lambda module: isinstance(module, nn.LayerNorm),
        lambda model, path, module, seen: setattr(module, 'weight', None),
    ),
    pruning=(
        lambda module: is_layer(module) or isinstance(module, nn.LayerNorm),
        reparametrise(prune.l1_unstructured, amount=0.3),
    ),
)
"""By name: which modules it suits, and what does it, as a function of (model, path, module, seen)."""


def duplicate(model, how):
    """The model itself, a deep copy, or one that went through pickle or torch.save."""
    if how == 'deepcopy':
        return copy.deepcopy(model)
    if how == 'pickle':
        return pickle.loads(pickle.dumps(model))
    if how == 'saved':
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)
    return model


@contextlib.contextmanager
def intervention(name, model, path, seen):
    """Do something to a module of a model, and undo what outlives the model."""
    handle = INTERVENTIONS[name][1](model, path, model.get_submodule(path), seen)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def places(name, model):
    """Paths of the modules that an intervention suits; not of those that are never called."""
    suits = INTERVENTIONS[name][0]
    found = []
    for path, module in model.named_modules():
        uncalled = path in ('', 'layers', f'layers.{len(model.layers) - 1}.downsample')
        if uncalled or not suits(module) or (name == 'identity' and not keeps_shape(path, module)):
            continue
        found.append(path)
    return found

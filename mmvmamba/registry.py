"""The registry scope of the project; import-light, since a failed import here shows up as "not in registry"."""

from mmengine.registry import FUNCTIONS as MMENGINE_FUNCTIONS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmvmamba',
    locations=['mmvmamba.models', 'mmvmamba.training.averaging', 'mmvmamba.export.runtime_backbone'],
)
HOOKS = Registry(
    'hook', parent=MMENGINE_HOOKS, scope='mmvmamba', locations=['mmvmamba.training.hooks', 'mmvmamba.export.int8']
)
FUNCTIONS = Registry(
    'function', parent=MMENGINE_FUNCTIONS, scope='mmvmamba', locations=['mmvmamba.training.padded_masks']
)
STRATEGIES = Registry(
    'strategy', parent=MMENGINE_STRATEGIES, scope='mmvmamba', locations=['mmvmamba.training.strategies']
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_CONSTRUCTORS,
    scope='mmvmamba',
    locations=['mmvmamba.training.layer_decay'],
)
OPTIM_WRAPPERS = Registry(
    'optimizer wrapper',
    parent=MMENGINE_OPTIM_WRAPPERS,
    scope='mmvmamba',
    locations=['mmvmamba.training.optim_wrapper'],
)


def register_backbone(cls):
    """Register a backbone as ``mmvmamba.Name`` and in the root scope, where a plain ``Name`` finds it from anywhere."""
    MODELS.register_module(module=cls)
    MMENGINE_MODELS.register_module(module=cls)
    return cls


def register_hook(cls):
    """Register a hook of training likewise."""
    HOOKS.register_module(module=cls)
    MMENGINE_HOOKS.register_module(module=cls)
    return cls

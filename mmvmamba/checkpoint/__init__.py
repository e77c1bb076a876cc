"""Pretrained weights of a backbone: from whichever file they come in, loaded strictly.

``init_cfg=dict(type='Pretrained', checkpoint=path_or_url)`` takes

- official classification files of VMamba: ``model``, and ``model_ema`` which is preferred if its accuracy is recorded;
- files saved by OpenMMLab: ``state_dict`` of a backbone, classifier, detector or segmentor, whose backbone is taken out
  (with ``EMAHook``, mmengine saves the averaged weights under that name);
- files of other trainers, see ``AVERAGED`` and ``PLACES`` in :mod:`mmvmamba.checkpoint.layouts`;
- bare state dicts of any of them, ``.safetensors`` too.

Every weight of the backbone must be there in its shape, and nothing else but stages after the last of ``out_indices``,
which are not built, and what the task replaces: the classifier, and the norms of the output maps (``outnorm*``) when
the file lacks some of those that the model has.  Anything else is a :class:`CheckpointError`, never a model with random
weights.

The ground floor of the package: it knows no model, layer or hook.
"""

from .download import fetch_checkpoint
from .errors import CheckpointError, MisfitError
from .files import find_damage, read_checkpoint, write_checkpoint
from .fit import Fitted, adapt_channels, fit_weights, load_pretrained
from .layouts import backbone_weights, is_state, select_weights, upgrade_hook, upgrade_names

__all__ = [
    'CheckpointError',
    'Fitted',
    'MisfitError',
    'adapt_channels',
    'backbone_weights',
    'fetch_checkpoint',
    'find_damage',
    'fit_weights',
    'is_state',
    'load_pretrained',
    'read_checkpoint',
    'select_weights',
    'upgrade_hook',
    'upgrade_names',
    'write_checkpoint',
]

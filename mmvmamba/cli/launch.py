"""What tools/train.py and tools/test.py share: one command line for the three codebases, told apart by the config."""

import argparse
import os
from copy import deepcopy
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.hooks import CheckpointHook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmvmamba.checkpoint import fetch_checkpoint

from .errors import UserError
from .models import CODEBASES, require_codebase

_PACK = dict(mmpretrain='PackInputs', mmdet='PackDetInputs', mmseg='PackSegInputs')
_SEVERAL = (list, tuple)
# what mmengine's Runner takes; any of these but the model may be missing or None
_KINDS = {
    **dict.fromkeys(('train_dataloader', 'val_dataloader', 'test_dataloader'), dict),
    **dict.fromkeys(('train_cfg', 'val_cfg', 'test_cfg', 'optim_wrapper', 'auto_scale_lr', 'default_hooks'), dict),
    **dict.fromkeys(('data_preprocessor', 'visualizer', 'env_cfg', 'log_processor', 'randomness', 'tta_model'), dict),
    **dict.fromkeys(('val_evaluator', 'test_evaluator', 'param_scheduler'), (dict, *_SEVERAL)),
    **dict.fromkeys(('custom_hooks', 'tta_pipeline'), _SEVERAL),
    **dict.fromkeys(('work_dir', 'load_from', 'experiment_name'), str),
    'resume': bool,
}
_FLIP_KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')


class OptionAction(DictAction):
    """mmengine's KEY=VALUE pairs; anything else is an error of the command line."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError, IndexError) as error:
            parser.error(f'{option_string} is {" ".join(values)!r}, expected KEY=VALUE pairs ({error})')


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that training and testing share."""
    parser.add_argument('--work-dir', help='where logs and checkpoints go (default: work_dirs/<name of the config>)')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (GPU)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=OptionAction,
        metavar='KEY=VALUE',
        help='settings that replace those of the config',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def load_config(args: argparse.Namespace) -> Config:
    """Load the config that the command line names and apply the shared arguments.

    Args:
        args (Namespace): Arguments of :func:`add_common_arguments` and ``config``.

    Returns:
        Config: With ``launcher`` and ``work_dir`` set.

    Raises:
        UserError: If the file is missing, not a config of one of the three codebases, or a setting has another type
            than mmengine's Runner takes.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if not Path(args.config).is_file():
        raise UserError(f'config {args.config!r} is not a file; expected the path of a config')
    try:
        cfg = Config.fromfile(args.config)
        if args.cfg_options:
            cfg.merge_from_dict(args.cfg_options)
    except Exception as error:  # a config is Python code, which can raise anything
        raise UserError(f'config {args.config!r} cannot be read: {type(error).__name__}: {error}') from error
    scope = cfg.get('default_scope')
    if scope not in CODEBASES:
        raise UserError(
            f'config {args.config!r} has default_scope {scope!r}, expected one of {", ".join(CODEBASES)}: it says '
            'which codebase runs the config, and comes with the default_runtime.py of each'
        )
    get_setting(cfg, 'model', needed=scope)
    for key, kinds in _KINDS.items():
        get_setting(cfg, key, kinds)
    for name in cfg.get('default_hooks') or ():
        get_setting(cfg, f'default_hooks.{name}')
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    return cfg


def get_setting(cfg: Config, key: str, kinds=dict, needed: str = ''):
    """Look up a setting; check its type and those of the settings around it.

    Args:
        cfg (Config): The config.
        key (str): Its names, joined by dots.
        kinds (type | tuple[type]): What it may be. Default: a dict.
        needed (str): What needs it, such as an option. Default: nothing does, it may be missing or None.

    Returns:
        The setting; None if it or one around it is missing or None.

    Raises:
        UserError: If a type is another one, or the setting is needed and missing.
    """
    names, value = key.split('.'), cfg
    purpose = f', for {needed}' if needed else ''
    for depth, name in enumerate(names, 1):
        place, wanted = '.'.join(names[:depth]), kinds if depth == len(names) else dict
        expected = ' or '.join(kind.__name__ for kind in (wanted if isinstance(wanted, tuple) else (wanted,)))
        value = value.get(name)
        if value is None and needed:
            raise UserError(f'the config has no {place}; expected a {expected}{purpose}')
        if value is None:
            return None
        if not isinstance(value, wanted):
            raise UserError(f'{place} is {value!r}, expected a {expected}{purpose}')
    return value


def check_data(cfg: Config, phase: str) -> None:
    """Check that a config has data for ``train``, ``val`` or ``test`` and what goes through them, and that they exist.

    Raises:
        UserError: If a setting is missing, or a local ``data_root`` does not exist.
    """
    name, needed = f'{phase}_dataloader', 'training' if phase == 'train' else 'evaluation'
    for dataset in _leaf_datasets(get_setting(cfg, name, needed=needed).get('dataset')):
        root = dataset.get('data_root')
        if root and not isinstance(root, str):
            raise UserError(f'data_root of {name} is {root!r}, expected a path')
        if root and '://' not in root and not Path(root).is_dir():
            raise UserError(
                f'data_root {root!r} of {name} is not a folder (relative to {os.getcwd()}); set it with '
                f'--cfg-options {name}.dataset.data_root=PATH or in the config'
            )
    for key in (f'{phase}_cfg', 'optim_wrapper' if phase == 'train' else f'{phase}_evaluator'):
        get_setting(cfg, key, _KINDS[key], needed)


def _leaf_datasets(dataset) -> list:
    """The data sets inside wrappers such as RepeatDataset or ConcatDataset."""
    if not isinstance(dataset, dict):
        return []
    inner = dataset.get('dataset') or dataset.get('datasets')
    if inner is None:
        return [dataset]
    return [leaf for part in (inner if isinstance(inner, (list, tuple)) else [inner]) for leaf in _leaf_datasets(part)]


def download(checkpoint: str) -> str:
    """Path of what an http(s) URL names; anything else is left as it is.

    mmengine would ignore the hash in its name, and accept plain http.

    Raises:
        CheckpointError: If it can't be downloaded.
    """
    is_url = checkpoint.lower().startswith(('http://', 'https://'))
    return fetch_checkpoint(checkpoint) if is_url else checkpoint


def use_atomic_checkpoints(cfg: Config) -> None:
    """Put :class:`~mmvmamba.training.hooks.AtomicCheckpointHook` where the config has mmengine's, or the default.

    Raises:
        UserError: If ``default_hooks`` or its ``checkpoint`` is no dict.
    """
    get_setting(cfg, 'default_hooks')
    if cfg.get('default_hooks') is None:
        cfg.default_hooks = ConfigDict()
    cfg.default_hooks.setdefault('checkpoint', ConfigDict(type='CheckpointHook', interval=1))
    hook = get_setting(cfg, 'default_hooks.checkpoint')
    if hook is not None and hook.get('type') in ('CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook):
        hook.type = 'mmvmamba.AtomicCheckpointHook'


def use_loader_defaults(cfg: Config) -> None:
    """Give mmpretrain's configs the settings of data loaders that ``mim train mmpretrain`` gives them.

    One tensor a batch rather than one an image, in pinned memory, from workers that stay.
    """
    if cfg.get('default_scope') != 'mmpretrain':
        return
    for phase in ('train', 'val', 'test'):
        loader = cfg.get(f'{phase}_dataloader')
        if loader:
            loader.setdefault('collate_fn', ConfigDict(type='default_collate'))
            loader.setdefault('pin_memory', torch.cuda.is_available())
            loader.setdefault('persistent_workers', bool(loader.get('num_workers')))


def set_test_time_augmentation(cfg: Config) -> None:
    """Replace model and pipeline by their test-time-augmented forms.

    ``tta_model`` and ``tta_pipeline`` come from the config; where the codebase has a convention for configs without
    them (mmpretrain, mmdet: average over a horizontal flip), that is used.

    Raises:
        UserError: If the config has none, and neither has the codebase; or for masks, which mmdet can't merge.
    """
    scope = cfg.default_scope
    if scope == 'mmdet' and get_setting(cfg, 'model.roi_head.mask_head', (dict, *_SEVERAL)) is not None:
        raise UserError('--tta: mmdet merges augmented boxes but not masks; the model has a mask_head, expected none')
    pipeline = get_setting(cfg, 'test_dataloader.dataset.pipeline', _SEVERAL, '--tta')
    if scope == 'mmseg':
        get_setting(cfg, 'tta_model', needed='--tta (mmseg::_base_/default_runtime.py has one)')
        get_setting(cfg, 'tta_pipeline', _SEVERAL, '--tta (mmseg::_base_/datasets/ have one each)')
    if cfg.get('tta_model') is None:
        cfg.tta_model = dict(type='AverageClsScoreTTA')
        if scope == 'mmdet':
            nms = dict(type='nms', iou_threshold=0.5)
            cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=nms, max_per_img=100))
    if cfg.get('tta_pipeline') is None:
        cfg.tta_pipeline = _flip_pipeline(pipeline, scope)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def _flip_pipeline(pipeline, scope: str) -> list:
    *steps, pack = deepcopy(pipeline) or [None]
    kind = pack.get('type') if isinstance(pack, dict) else None
    if getattr(kind, '__name__', str(kind)).rpartition('.')[2] != _PACK[scope]:
        raise UserError(
            f'--tta without tta_pipeline needs a test_dataloader.dataset.pipeline that ends in {_PACK[scope]}, '
            f'got {pack}'
        )
    if scope == 'mmdet':
        pack.meta_keys = _FLIP_KEYS
    flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
    return [*steps, dict(type='TestTimeAug', transforms=[flips, [pack]])]


def set_visualization(cfg: Config, show_dir: str) -> None:
    """Let the test draw its predictions into a folder: by the codebase's own visualization hook.

    Raises:
        UserError: If the config's ``default_hooks`` has no ``visualization``, or mmseg's no ``visualizer``.
    """
    hook = get_setting(cfg, 'default_hooks.visualization', needed='--show-dir (each default_runtime.py has one)')
    if cfg.default_scope == 'mmpretrain':
        hook.update(enable=True, out_dir=show_dir, interval=1)
    elif cfg.default_scope == 'mmdet':
        hook.update(draw=True, test_out_dir=os.path.abspath(show_dir))
    else:
        hook.update(draw=True, interval=1)
        get_setting(cfg, 'visualizer', needed='--show-dir').save_dir = show_dir


def build_runner(cfg: Config) -> Runner:
    """Build the config's runner; several processes without a GPU talk through gloo.

    mmengine 0.10 gives each process a CUDA device, which fails without one, so that their group is made here.

    Raises:
        UserError: If the config's codebase can't be imported.
    """
    require_codebase(cfg.default_scope)
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group('gloo')
        wrapper = cfg.get('model_wrapper_cfg') or dict(
            broadcast_buffers=False, find_unused_parameters=cfg.get('find_unused_parameters', False)
        )
        cfg.model_wrapper_cfg = dict(dict(type='MMDistributedDataParallel'), **wrapper, device_ids=None)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)

"""What tools/train.py and tools/test.py share: one command line for the three codebases, told apart by the config."""

import argparse
import os
from copy import deepcopy
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

CODEBASES = ('mmpretrain', 'mmdet', 'mmseg')
_PACK = dict(mmpretrain='PackInputs', mmdet='PackDetInputs', mmseg='PackSegInputs')
_FLIP_KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')


class LaunchError(Exception):
    """A command line or config that can't be run; the message says what was found and what was expected."""


class OptionAction(DictAction):
    """mmengine's KEY=VALUE pairs; what is none is an error of the command line."""

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
        help='settings that replace the config ones',
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
        LaunchError: If the file is missing or not a config of one of the three codebases.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if not Path(args.config).is_file():
        raise LaunchError(f'config {args.config!r} is not a file; expected the path of a config')
    try:
        cfg = Config.fromfile(args.config)
        if args.cfg_options:
            cfg.merge_from_dict(args.cfg_options)
    except Exception as error:  # a config is Python code, which can raise anything
        raise LaunchError(f'config {args.config!r} can not be read: {type(error).__name__}: {error}') from error
    scope = cfg.get('default_scope')
    if scope not in CODEBASES:
        raise LaunchError(
            f'config {args.config!r} has default_scope {scope!r}, expected one of {", ".join(CODEBASES)}: it says '
            'which codebase runs the config, and comes with the default_runtime.py of each'
        )
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    return cfg


def check_data(cfg: Config, phase: str) -> None:
    """Check that a config has data for ``train``, ``val`` or ``test``, and that their folder exists.

    Raises:
        LaunchError: If the data loader is missing, or a local ``data_root`` does not exist.
    """
    name = f'{phase}_dataloader'
    if cfg.get(name) is None:
        raise LaunchError(
            f'the config has no {name}; expected one, to {"train" if phase == "train" else "evaluate"} on'
        )
    if not isinstance(cfg[name], dict):
        raise LaunchError(f'{name} is {cfg[name]!r}, expected a dict')
    for dataset in _leaf_datasets(cfg[name].get('dataset')):
        root = dataset.get('data_root')
        if root and not isinstance(root, str):
            raise LaunchError(f'data_root of {name} is {root!r}, expected a path')
        if root and '://' not in root and not Path(root).is_dir():
            raise LaunchError(
                f'data_root {root!r} of {name} is not a folder (relative to {os.getcwd()}); set it with '
                f'--cfg-options {name}.dataset.data_root=PATH or in the config'
            )


def _leaf_datasets(dataset) -> list:
    """The data sets inside wrappers such as RepeatDataset or ConcatDataset."""
    if not isinstance(dataset, dict):
        return []
    inner = dataset.get('dataset') or dataset.get('datasets')
    if inner is None:
        return [dataset]
    return [leaf for part in (inner if isinstance(inner, (list, tuple)) else [inner]) for leaf in _leaf_datasets(part)]


def use_atomic_checkpoints(cfg: Config) -> None:
    """Put :class:`mmvmamba.hooks.AtomicCheckpointHook` where the config has mmengine's own, or the default one."""
    hooks = cfg.setdefault('default_hooks', ConfigDict())
    hook = hooks.setdefault('checkpoint', ConfigDict(type='CheckpointHook', interval=1))
    if hook is not None and hook.get('type') in ('CheckpointHook', 'mmengine.CheckpointHook'):
        hook.type = 'mmvmamba.AtomicCheckpointHook'


def set_test_time_augmentation(cfg: Config) -> None:
    """Replace model and pipeline by their test-time-augmented forms.

    ``tta_model`` and ``tta_pipeline`` come from the config; where the codebase has a convention for configs without
    them (mmpretrain, mmdet: average over a horizontal flip), that is used.

    Raises:
        LaunchError: If the config has none, and neither has the codebase; or for masks, which mmdet can't merge.
    """
    scope = cfg.default_scope
    if scope == 'mmdet' and (cfg.model.get('roi_head') or {}).get('mask_head') is not None:
        raise LaunchError('--tta: mmdet merges augmented boxes but not masks; the model has a mask_head, expected none')
    if 'tta_model' not in cfg:
        if scope == 'mmseg':
            raise LaunchError('--tta needs tta_model in the config; mmseg::_base_/default_runtime.py has one')
        cfg.tta_model = dict(type='AverageClsScoreTTA')
        if scope == 'mmdet':
            nms = dict(type='nms', iou_threshold=0.5)
            cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=nms, max_per_img=100))
    if 'tta_pipeline' not in cfg:
        if scope == 'mmseg':
            raise LaunchError('--tta needs tta_pipeline in the config; mmseg::_base_/datasets/ have one each')
        cfg.tta_pipeline = _flip_pipeline(cfg.test_dataloader.dataset.pipeline, scope)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def _flip_pipeline(pipeline: list, scope: str) -> list:
    *steps, pack = deepcopy(pipeline)
    if pack.get('type', '').rpartition('.')[2] != _PACK[scope]:
        raise LaunchError(f'--tta without tta_pipeline needs a test pipeline that ends in {_PACK[scope]}, got {pack}')
    if scope == 'mmdet':
        pack.meta_keys = _FLIP_KEYS
    flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
    return [*steps, dict(type='TestTimeAug', transforms=[flips, [pack]])]


def set_visualization(cfg: Config, show_dir: str) -> None:
    """Let the test draw its predictions into a folder: by the codebase's own visualization hook.

    Raises:
        LaunchError: If the config's ``default_hooks`` has no ``visualization``.
    """
    hook = cfg.default_hooks.get('visualization')
    if hook is None:
        raise LaunchError('--show-dir needs default_hooks.visualization in the config, as in each default_runtime.py')
    if cfg.default_scope == 'mmpretrain':
        hook.update(enable=True, out_dir=show_dir, interval=1)
    elif cfg.default_scope == 'mmdet':
        hook.update(draw=True, test_out_dir=os.path.abspath(show_dir))
    else:
        hook.update(draw=True, interval=1)
        cfg.visualizer.save_dir = show_dir


def build_runner(cfg: Config) -> Runner:
    """Build the config's runner; several processes without a GPU talk through gloo.

    mmengine 0.10 gives each process a CUDA device, which fails without one, so that their group is made here.
    """
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        torch.distributed.init_process_group('gloo')
        wrapper = cfg.get('model_wrapper_cfg') or dict(
            broadcast_buffers=False, find_unused_parameters=cfg.get('find_unused_parameters', False)
        )
        cfg.model_wrapper_cfg = dict(dict(type='MMDistributedDataParallel'), **wrapper, device_ids=None)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)

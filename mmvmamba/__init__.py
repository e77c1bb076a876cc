"""VMamba for OpenMMLab: one backbone for mmpretrain, mmdet and mmsegmentation."""

try:
    from .export import RuntimeBackbone  # noqa: F401  (registers it under its plain name)
    from .mmcv_ops import install
    from .models import MM_VSSM, VSSMBackbone
    from .training import hooks  # noqa: F401  (registers them under plain names)
    from .training.averaging import ForeachEMA
    from .training.optim_wrapper import FastOptimWrapper
    from .training.preprocess import BatchClsDataPreprocessor
    from .training.runtime import setup_runtime
    from .version import __version__
except ModuleNotFoundError as error:
    if error.name != f'{__name__}.ops':
        raise
    raise ModuleNotFoundError(
        f"{__path__[0]} has no 'ops': it is a source tree and hides the installed mmvmamba; run from another folder, "
        'or install the tree itself, there: pip install --no-build-isolation -e .',
        name=error.name,
    ) from error

setup_runtime()
install()

__all__ = ['MM_VSSM', 'BatchClsDataPreprocessor', 'FastOptimWrapper', 'ForeachEMA', 'VSSMBackbone', '__version__']

"""How an import of ``mmcv._ext`` finds the stand-in where nothing else provides one."""

import os

from .stand_in import StandInFinder

NAME = 'mmcv._ext'
SWITCH = 'MMVMAMBA_MMCV_OPS'
COMPILE = "MMCV_WITH_OPS=1 pip install --no-build-isolation --no-binary mmcv 'mmcv==2.1.0'"


def switched_off() -> bool:
    """Whether ``MMVMAMBA_MMCV_OPS`` disables the stand-in.

    Raises:
        ImportError: For a value that is neither empty, ``on`` nor ``off``.
    """
    value = os.environ.get(SWITCH, '')
    if value not in ('', 'on', 'off'):
        raise ImportError(f'{SWITCH} is {value!r}, expected on or off')
    return value == 'off'


def fill(namespace: dict) -> None:
    """Make a module's namespace that of ``mmcv._ext``.

    Raises:
        ModuleNotFoundError: If ``MMVMAMBA_MMCV_OPS=off``, as if there were no module.
        ImportError: If torchvision does not load beside this torch.
    """
    if switched_off():
        raise _switched_off()
    from . import extension  # torch and torchvision, only where they are needed

    extension.fill(namespace)


def _switched_off() -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f'No module named {NAME!r}: mmcv has no compiled ops, and {SWITCH}=off disables those of mmvmamba; unset it, '
        f'or compile mmcv: {COMPILE}',
        name=NAME,
    )


class ExtensionFinder(StandInFinder):
    """Finds ``mmcv._ext`` alone."""

    def provides(self, name):
        if name == NAME and switched_off():
            raise _switched_off()
        return name == NAME

    def origin(self, name):
        return 'mmvmamba.mmcv_ops.extension'

    def fill(self, name, namespace):
        fill(namespace)


FINDER = ExtensionFinder()
install = FINDER.install

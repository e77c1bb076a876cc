"""Which ops ``mmcv.ops`` gets in this process."""

import importlib
from dataclasses import dataclass

from .finder import NAME, SWITCH, switched_off
from .placing import is_placed, mmcv_folder


@dataclass(frozen=True)
class State:
    """What provides ``mmcv._ext``.

    Attributes:
        kind (str): ``compiled``, ``stand-in``, ``broken`` (found, but it fails to load) or ``none``.
        reason (str): Where it comes from, or what is wrong.
        placed (bool): Whether our file lies in mmcv's folder, so that commands which do not import mmvmamba find it.
    """

    kind: str
    reason: str
    placed: bool = False

    @property
    def works(self) -> bool:
        """Whether ``mmcv.ops`` can be imported."""
        return self.kind in ('compiled', 'stand-in')


def state() -> State:
    """Import ``mmcv._ext`` as ``mmcv.ops`` does, and say what came of it."""
    folder = mmcv_folder()
    if folder is None:
        return State('none', 'mmcv is not installed')
    placed = is_placed(folder)
    try:
        extension = importlib.import_module(NAME)
    except Exception as error:  # whatever a broken library raises is the answer
        if isinstance(error, ModuleNotFoundError) and error.name == NAME:
            return State('none', f'{SWITCH}=off' if switched_off() else f'no _ext in {folder}', placed)
        return State('broken', f'{type(error).__name__}: {error}', placed)
    if not getattr(extension, '__stand_in__', False):
        return State('compiled', str(extension.__file__), placed)
    return State('stand-in', 'placed in ' + str(folder) if placed else 'found once mmvmamba is imported', placed)

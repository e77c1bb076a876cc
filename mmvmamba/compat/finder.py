"""How an import of a name that other projects use finds the module that mmvmamba provides for it."""

import importlib
import sys
from pathlib import Path

from ..mmcv_ops.stand_in import StandInFinder

PROVIDED = f'{__package__}.provided'
EXTENSIONS = (
    'selective_scan_cuda',
    'selective_scan_cuda_core',
    'selective_scan_cuda_nrow',
    'selective_scan_cuda_oflex',
    'selective_scan_cuda_ndstate',
    'selective_scan_cuda_oflex_rh',
    'causal_conv1d_cuda',
)
PACKAGES = ('mamba_ssm', 'selective_scan', 'causal_conv1d')
NAMES = EXTENSIONS + PACKAGES


def source_of(name: str) -> Path:
    """The file of the provided module ``name``, a package's ``__init__.py`` included; it need not exist."""
    path = Path(__file__).parent.joinpath('provided', *name.split('.'))
    return path / '__init__.py' if path.is_dir() else path.with_suffix('.py')


class NameFinder(StandInFinder):
    """Finds the names in :data:`NAMES` and the modules below them, below a package that is provided only."""

    def provides(self, name):
        top, _, below = name.partition('.')
        if top not in NAMES:
            return False
        return not below or (is_provided(top) and source_of(name).is_file())

    def find_spec(self, fullname, path=None, target=None):
        spec = super().find_spec(fullname, path, target)
        if spec is not None:
            spec.has_location = True  # so that the module has a __file__
        return spec

    def origin(self, name):
        return str(source_of(name))

    def is_package(self, name):
        return source_of(name).name == '__init__.py'

    def fill(self, name, namespace):
        content = vars(importlib.import_module(f'{PROVIDED}.{name}'))
        kept = ('__doc__', '__all__', '__version__', '__getattr__')
        namespace.update({key: value for key, value in content.items() if key in kept or not key.startswith('__')})
        namespace['__stand_in__'] = True


class ReplacementFinder(NameFinder):
    """Finds some names before all other finders: those that :func:`mmvmamba.compat.install` is to replace."""

    def __init__(self):
        self.names: set = set()

    def provides(self, name):
        return name.partition('.')[0] in self.names and super().provides(name)

    def install(self):
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def _is_found_later(self, fullname, path, target):
        return False


FINDER = NameFinder()
REPLACEMENT = ReplacementFinder()


def is_provided(name: str) -> bool:
    """Whether the module that was imported under ``name`` is ours."""
    return getattr(sys.modules.get(name), '__stand_in__', False) is True

"""A finder of modules that nothing else provides: it belongs at the end of ``sys.meta_path``."""

import importlib.abc
import importlib.machinery
import sys


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by name, where no other finder does, and fills their namespaces.

    Subclasses say which names, and what goes into them.  An installed module is found before, and one that fails to
    load stays an error, since no further finder is asked then.
    """

    def provides(self, name: str) -> bool:
        """Whether a module of this name is to be found."""
        raise NotImplementedError

    def origin(self, name: str) -> str:
        """Where the module's content comes from, for its ``__spec__``."""
        raise NotImplementedError

    def fill(self, name: str, namespace: dict) -> None:
        """Make a module's namespace that of the module of this name."""
        raise NotImplementedError

    def is_package(self, name: str) -> bool:
        """Whether the module has modules below it."""
        return False

    def find_spec(self, fullname, path=None, target=None):
        if not self.provides(fullname) or self._is_found_later(fullname, path, target):
            return None
        return importlib.machinery.ModuleSpec(
            fullname, self, origin=self.origin(fullname), is_package=self.is_package(fullname)
        )

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        self.fill(module.__spec__.name, vars(module))

    def install(self) -> None:
        """Let this process find the modules after all other finders; once is enough."""
        if self not in sys.meta_path:
            sys.meta_path.append(self)

    def _is_found_later(self, fullname, path, target) -> bool:
        """Whether a finder that was appended after this one has the module."""
        later = sys.meta_path[sys.meta_path.index(self) + 1 :] if self in sys.meta_path else []
        others = (finder for finder in later if not isinstance(finder, StandInFinder))
        return any(getattr(finder, 'find_spec', _none)(fullname, path, target) is not None for finder in others)


def _none(*_):
    return None

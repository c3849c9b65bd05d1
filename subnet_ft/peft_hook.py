"""Makes PEFT know our type without importing PEFT.

``PeftModel.from_pretrained`` on one of our adapters needs ``SUBNET_FT`` registered, and PEFT has no
plug-in discovery. Importing PEFT costs seconds that ``subnet-ft extract`` should not pay, so
registration waits until somebody else has imported it.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def install() -> None:
    """Register with PEFT now if it is loaded, else as soon as it is."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _register() -> None:
    import_module("subnet_ft.adapter")


class _PeftFinder(MetaPathFinder):
    """Hands out the real ``peft`` spec with a loader that registers us once the import is done.

    It stays until PEFT really runs: asking for the spec alone (as availability checks do) is no
    import.
    """

    def __init__(self) -> None:
        self._looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" or self._looking:
            return None
        self._looking = True
        try:
            spec = find_spec("peft")
        finally:
            self._looking = False
        if spec is None or spec.loader is None:
            return None
        run_module = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            run_module(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

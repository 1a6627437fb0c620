"""TransformerEngine's Python with its compiled part replaced: modules can be built, loaded and saved, and
nothing can be computed.

`make venv-latest` puts the Python files of the release that constraints.txt names into a folder of their own,
so that nothing else finds them.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

FOLDER = Path(sys.prefix) / "transformer-engine"


def install() -> None:
    """Make `import transformer_engine` work in this process, before anything has asked for it."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # do not look for the compiled libraries
    sys.path.insert(0, str(FOLDER))
    sys.modules[_Extension.name] = _Extension()
    # What exports to ONNX, with packages of its own.
    sys.modules["transformer_engine.pytorch.onnx_extensions"] = mock.MagicMock()
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None


class _Extension(types.ModuleType):
    """transformer_engine_torch: whatever is asked for exists. What begins with a capital is an enumeration or
    a class, everything else a function that cannot be called."""

    name = "transformer_engine_torch"

    def __init__(self) -> None:
        super().__init__(self.name)
        self.__spec__ = importlib.machinery.ModuleSpec(self.name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Members(name, (int,), {}) if name[0].isupper() else _function(name)
        setattr(self, name, value)
        return value


class _Members(type):
    """The type of an enumeration whose members are made as they are asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member = cls(len(cls.__members__))
        member.name, member.value = name, int(member)
        setattr(cls, name, member)
        return member

    @property
    def __members__(cls) -> dict[str, Any]:
        return {name: value for name, value in vars(cls).items() if isinstance(value, cls)}


def _function(name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{_Extension.name}.{name}: TransformerEngine's compiled part is not here")

    return call

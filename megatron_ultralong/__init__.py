"""Training of ultra-long-context Llama models on Megatron-Core.

As a library: the names of `__all__`, each imported, with torch, when it is first used (docs/library.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from megatron_ultralong.config import Model
    from megatron_ultralong.context_parallel.api import ContextGroups, split_group
    from megatron_ultralong.context_parallel.virtual_ranks import run_virtual
    from megatron_ultralong.errors import UserError
    from megatron_ultralong.library import (
        attention,
        export_hf,
        import_hf,
        join_shards,
        passkey_prompt,
        plan,
        read_rope,
        rope_table,
        token_positions,
    )
    from megatron_ultralong.model.rotary_embedding import apply_rope

__all__ = [
    "ContextGroups",
    "Model",
    "UserError",
    "__version__",
    "apply_rope",
    "attention",
    "export_hf",
    "import_hf",
    "join_shards",
    "passkey_prompt",
    "plan",
    "read_rope",
    "rope_table",
    "run_virtual",
    "split_group",
    "token_positions",
]

_ELSEWHERE = {
    "ContextGroups": "context_parallel.api",
    "Model": "config",
    "UserError": "errors",
    "apply_rope": "model.rotary_embedding",
    "run_virtual": "context_parallel.virtual_ranks",
    "split_group": "context_parallel.api",
}
"""The module of each name that is not in library.py."""


if not TYPE_CHECKING:  # a type checker finds names that do not exist

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'library')}")
        value = globals()[name] = getattr(module, name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

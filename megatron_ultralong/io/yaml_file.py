"""A user's YAML file; any mistake in it is reported in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError


def read(path: Path, flag: str) -> Any:
    """Read the content of a YAML file. flag: the option that names it, for errors. UserError where it cannot
    be read, is not YAML, or has a duplicate key."""
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, which also refuses duplicate keys: PyYAML silently keeps only the last one."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            again = next((key for k, key in enumerate(keys) if key in keys[:k]), None)
            if again is not None:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {again}", node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{flag} {path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # like a date that does not exist
        raise UserError(f"{flag} {path}: not YAML: {' '.join(str(error).split())}") from None

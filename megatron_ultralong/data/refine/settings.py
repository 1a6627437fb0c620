"""Settings of a refinement: the endpoint, the number of attempts, and prices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ultralong.errors import UserError
from megatron_ultralong.io import endpoint_client


@dataclass(frozen=True, kw_only=True)
class RefineSettings:
    """All fields but the last are flags of the tool. UserError for values out of range."""

    model: str
    base_url: str = endpoint_client.OPENAI
    key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable with the key."""
    concurrency: int = 16
    """Requests in flight at a time."""
    timeout: float = 300.0
    """Seconds for one try."""
    retries: int = 6
    """Tries after the first while the endpoint is busy or broken."""
    attempts: int = 2
    """Answers requested until one passes the checks."""
    max_tokens: int = 4096
    temperature: float | None = None
    """None: the endpoint's default."""
    domain: Literal["general", "math", "code"] = "general"
    """Of examples without one."""
    turns: Literal["last", "all"] = "last"
    """Which assistant messages are rewritten."""
    price_in: float | None = None
    """USD per million prompt tokens."""
    price_out: float | None = None
    limit: int | None = None
    """Number of examples, from the first."""
    budget: float | None = None
    """USD for everything in the request log, earlier runs included."""
    retry_failed: bool = False
    backoff: float = 1.0
    """Upper limit of the first wait before another try, seconds."""

    def __post_init__(self) -> None:
        for name, minimum in (
            ("concurrency", 1),
            ("retries", 0),
            ("attempts", 1),
            ("max_tokens", 1),
            ("limit", 1),
            ("temperature", 0),
            ("price_in", 0),
            ("price_out", 0),
        ):
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                option = "examples" if name == "limit" else name.replace("_", "-")
                raise UserError(f"--{option} {value}: must be at least {minimum}")
        for name in ("timeout", "budget"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name} {value}: must be more than 0")
        if (self.price_in is None) != (self.price_out is None):
            raise UserError("--price-in and --price-out: give both or neither")
        if self.budget is not None and self.price_in is None:
            raise UserError("--budget requires --price-in and --price-out, USD per million tokens")
        object.__setattr__(self, "base_url", endpoint_client.check_base_url(self.base_url))

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """Return USD; None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

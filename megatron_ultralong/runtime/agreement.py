"""Agreement of ranks on errors and values: an error on one rank is raised on all, so that no rank waits for
one that has left.

Every function is a collective: all ranks of the group call it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from megatron_ultralong.errors import UserError

T = TypeVar("T")


def on_every_rank(act: Callable[[], T], group: Any = None) -> T:
    """Call `act` on every rank and return this rank's result.

    A UserError of any rank is raised on all of them, the first rank's if several fail. Another exception is
    raised where it occurs, and as a UserError that names it elsewhere.
    """
    error: Exception | None = None
    try:
        result = act()
    except Exception as caught:
        error = caught
    message = None if error is None else str(error) if isinstance(error, UserError) else _one_line(error)
    messages = gather(message, group)
    if error is not None and not isinstance(error, UserError):
        raise error
    for message in messages:
        if message is not None:
            raise UserError(message)
    return result


def on_main_rank(act: Callable[[], T]) -> T:
    """Call `act` on rank 0 and return its result on every rank; its UserError is raised on all of them."""
    is_main = torch.distributed.get_rank() == 0
    box = [on_every_rank(lambda: act() if is_main else None)]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def gather(value: Any, group: Any = None) -> list[Any]:
    """Every rank's value, in rank order. The value is pickled."""
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def first_rank_where(condition: bool, device: torch.device) -> int | None:
    """The first rank on which `condition` holds; None if it holds on none. One reduction on `device`."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    highest = torch.tensor([world - rank if condition else 0], device=device)
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    return world - int(highest) if int(highest) else None


def _one_line(error: Exception) -> str:
    rank = torch.distributed.get_rank()
    return f"rank {rank} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

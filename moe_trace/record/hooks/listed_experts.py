"""Experts that are modules of their own: how many rows enter each."""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from moe_trace.record.forward.copied_models import HookOwner, detach_if_copy
from moe_trace.record.hooks.events import ROWS, EventLog, event_code


class ListedExpert(HookOwner):
    """The hook of one expert.

    Args:
        site: number of the router in the events.
        number: of the expert among those of the router.
    """

    def __init__(self, expert: nn.Module, site: int, number: int, log: EventLog) -> None:
        self._expert, self._code, self._number, self._log = expert, event_code(ROWS, site), number, log

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        """Forward pre-hook: shapes alone, which the host knows."""
        if is_dynamo_compiling():
            return
        if module is not self._expert and detach_if_copy(module, self._expert):
            return
        given = (*args, *(kwargs or {}).values())
        shape = next((value.shape for value in given if isinstance(value, Tensor)), None)
        if shape is not None:
            self._log.note((self._code, get_ident(), self._number, shape[:-1].numel(), None))


def total_rows(calls: Sequence[tuple[int, int]], experts: int) -> tuple[int, ...]:
    """[E] of what each call of an expert received; one may be called several times, or never."""
    rows = [0] * experts
    for number, count in calls:
        rows[number] += count
    return tuple(rows)

"""Which step a model is in, and whether it is recorded."""

from __future__ import annotations

from typing import Any


class Steps:
    """Counts steps: those of a profiler where one is attached, else forwards, or what `end` ends.

    Args:
        every: record every n-th step.
        warmup: steps to leave out at the start.
    """

    def __init__(self, *, every: int, warmup: int) -> None:
        self.every, self.warmup = every, warmup
        self.forwards = 0
        """Forwards of the model that the host has seen."""
        self.profiler: Any = None
        """Its `step_num` counts, where it has one."""
        self._by_hand: int | None = None

    def now(self) -> int:
        """The step under way."""
        if self.profiler is not None:
            return int(getattr(self.profiler, "step_num", 0))
        return self.forwards if self._by_hand is None else self._by_hand

    def begin(self) -> tuple[int, bool]:
        """A forward begins: (its step, whether it is recorded)."""
        step = self.forwards if self._by_hand is None else self._by_hand
        if self.profiler is not None:
            step = int(getattr(self.profiler, "step_num", 0))
        self.forwards += 1
        return step, step >= self.warmup and (step - self.warmup) % self.every == 0

    def samples(self, step: int) -> bool:
        """Whether a step is recorded."""
        return step >= self.warmup and (step - self.warmup) % self.every == 0

    @property
    def are_forwards(self) -> bool:
        """Whether each forward is a step of its own."""
        return self.profiler is None and self._by_hand is None

    def end(self) -> None:
        """End a step by hand; the forwards before the first such end were one step."""
        self._by_hand = self.now() + 1 if self._by_hand is not None else max(1, self.forwards)

    def leave(self, profiler: Any) -> None:
        """It counts no more: steps go on from where it was."""
        if self.profiler is profiler:
            self._by_hand, self.profiler = self.now(), None

    def count_by_hand(self) -> None:
        """From now on a step ends with `end` only."""
        self._by_hand = self.now()

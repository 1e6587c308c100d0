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
        self._by_user = False
        """Who ends steps by hand is the user, not a profiler that nobody attached."""
        self._ended_at = -1
        """Forwards at the last end that a profiler made."""

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
        twice = not self._by_user and self._ended_at == self.forwards
        self._by_user = True
        if not twice:
            self._end()

    def _end(self) -> None:
        self._by_hand = self.now() + 1 if self._by_hand is not None else max(1, self.forwards)

    def follow(self, profiler: Any, event: str) -> None:
        """A profiler that nobody attached begins, steps or stops: its steps count, unless the user does.

        One with a schedule is stepped from its start on; with others, forwards count until `step` is called
        and again after `stop`.
        """
        if self._by_user or self.profiler is not None:
            return
        if event == "step":
            self._end()
            self._ended_at = self.forwards
        elif event == "stop":
            self._by_hand = None
        elif getattr(profiler, "record_steps", False):
            self._by_hand = self.now()

    def leave(self, profiler: Any) -> None:
        """It counts no more: steps go on from where it was."""
        if self.profiler is profiler:
            self._by_hand, self.profiler = self.now(), None

    def count_by_hand(self) -> None:
        """From now on a step ends with `end` only."""
        self._by_hand, self._by_user = self.now(), True

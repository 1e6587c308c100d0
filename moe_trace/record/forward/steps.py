"""Current step of a model, and whether it is recorded."""

from __future__ import annotations

from typing import Any


class Steps:
    """Counter of steps: those of an attached profiler, else forwards, or calls of `end`.

    Args:
        every: record every n-th step.
        warmup: number of steps to skip at the start.
    """

    def __init__(self, *, every: int, warmup: int) -> None:
        self.every, self.warmup = every, warmup
        self.forwards = 0
        """Number of forwards of the model that the host has seen."""
        self.profiler: Any = None
        """Attached profiler, whose `step_num` is the step."""
        self._by_hand: int | None = None
        self._by_user = False
        """Whether the user ends steps by hand, rather than a profiler that was not attached."""
        self._ended_at = -1
        """Number of forwards when a profiler last ended a step."""

    def now(self) -> int:
        """Return the current step."""
        if self.profiler is not None:
            return int(getattr(self.profiler, "step_num", 0))
        return self.forwards if self._by_hand is None else self._by_hand

    def begin(self) -> tuple[int, bool]:
        """Begin a forward; return (its step, whether it is recorded)."""
        step = self.forwards if self._by_hand is None else self._by_hand
        if self.profiler is not None:
            step = int(getattr(self.profiler, "step_num", 0))
        self.forwards += 1
        return step, step >= self.warmup and (step - self.warmup) % self.every == 0

    def samples(self, step: int) -> bool:
        """Return whether a step is recorded."""
        return step >= self.warmup and (step - self.warmup) % self.every == 0

    @property
    def are_forwards(self) -> bool:
        """Whether each forward is a step of its own."""
        return self.profiler is None and self._by_hand is None

    def end(self) -> None:
        """End a step by hand; all forwards before the first such call form one step."""
        already_ended = not self._by_user and self._ended_at == self.forwards
        self._by_user = True
        if not already_ended:
            self._end()

    def _end(self) -> None:
        self._by_hand = self.now() + 1 if self._by_hand is not None else max(1, self.forwards)

    def follow(self, profiler: Any, event: str) -> None:
        """Follow the steps of a profiler that was not attached, unless the user counts steps.

        A profiler with a schedule is stepped from its start on; with others, forwards count until `step` is
        called, and again after `stop`.
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
        """Detach the profiler; steps continue from its current one."""
        if self.profiler is profiler:
            self._by_hand, self.profiler = self.now(), None

    def count_by_hand(self) -> None:
        """Count steps by `end` alone from now on."""
        self._by_hand, self._by_user = self.now(), True

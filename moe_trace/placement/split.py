"""Which observations a plan is chosen on, and which others it is judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moe_trace.data.errors import UsageError
from moe_trace.placement.counts import ExpertCounts

Way = Literal["auto", "alternate", "halves", "each", "none"]
WAYS: tuple[Way, ...] = ("auto", "alternate", "halves", "each", "none")
MAX_FOLDS = 64
_SHOWN = 8


@dataclass(frozen=True)
class Fold:
    """One choice and its judgement: indices of observations."""

    chosen: tuple[int, ...]
    judged: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """All folds, and in words what they are."""

    folds: tuple[Fold, ...]
    words: str
    in_sample: bool
    """Whether plans are judged on what they were chosen on: too good to be true for other inputs."""

    @property
    def chosen(self) -> list[int]:
        """Observations that any fold chooses on."""
        return sorted({i for fold in self.folds for i in fold.chosen})


def split_by(counts: ExpertCounts, way: Way = "auto") -> Split:
    """The usual splits. `auto`: steps in turn, texts one at a time, and a single observation not at all.

    Raises:
        UsageError: fewer than two observations for a split, or too many for `each`.
    """
    number = len(counts.labels)
    if way == "auto":
        way = "none" if number == 1 else "alternate" if counts.kind == "step" else "each"
    if way == "none":
        return _in_sample(counts)
    if number < 2:
        raise UsageError(
            f"{counts.source}: found one {counts.kind}, expected two or more for --split {way}; record more, "
            "or use --split none, which judges in-sample"
        )
    return _known(counts, _each(counts) if way == "each" else _two_parts(counts, way))


def _known(counts: ExpertCounts, split: Split) -> Split:
    """In-sample all the same where the judged counts are those chosen on: a batch that repeats."""
    rows = [counts.counts_SLE[i].tobytes() for i in range(len(counts.labels))]
    for fold in split.folds:
        seen = {rows[i] for i in fold.chosen}
        if any(rows[i] not in seen for i in fold.judged):
            return split
    same = f"in-sample: the {counts.kind}s held out have the same counts as those chosen on"
    return replace(split, words=f"{split.words} ({same})", in_sample=True)


def _in_sample(counts: ExpertCounts) -> Split:
    """Steps are judged all together, texts one by one."""
    number = len(counts.labels)
    every = tuple(range(number))
    by_itself = counts.kind == "text" and 1 < number <= MAX_FOLDS
    folds = tuple(Fold(every, (i,)) for i in every) if by_itself else (Fold(every, every),)
    words = f"plans are chosen and judged on {_many(counts.kind, number)}"
    words += ", each judged by itself" if by_itself else ""
    return Split(folds, f"{words} (in-sample: nothing was held out)", in_sample=True)


def _each(counts: ExpertCounts) -> Split:
    number = len(counts.labels)
    if number > MAX_FOLDS:
        raise UsageError(
            f"found {number} {counts.kind}s, expected at most {MAX_FOLDS} for --split each; use alternate or "
            "halves"
        )
    folds = tuple(Fold(tuple(j for j in range(number) if j != i), (i,)) for i in range(number))
    return Split(folds, f"each {counts.kind} is judged by plans chosen on all the others", in_sample=False)


def _two_parts(counts: ExpertCounts, way: Way) -> Split:
    every = tuple(range(len(counts.labels)))
    middle = len(every) // 2
    parts = (every[::2], every[1::2]) if way == "alternate" else (every[:middle], every[middle:])
    names = f"every second {counts.kind}" if way == "alternate" else f"half of the {counts.kind}s"
    words = (
        f"plans are chosen on {names} ({len(parts[0])}), judged on the others ({len(parts[1])}), and the "
        "other way round"
    )
    return Split((Fold(*parts), Fold(parts[1], parts[0])), words, in_sample=False)


def split_named(counts: ExpertCounts, choose_on: Sequence[str], judge_on: Sequence[str]) -> Split:
    """Choose on some observations and judge on others, by label.

    Raises:
        UsageError: a label that the source does not have, or none.
    """
    fold = Fold(_indices(counts, choose_on, "--choose-on"), _indices(counts, judge_on, "--judge-on"))
    shared = set(fold.chosen) & set(fold.judged)
    words = f"plans are chosen on {_names(counts, fold.chosen)}, judged on {_names(counts, fold.judged)}"
    if shared:
        words += f" (in-sample for {_names(counts, sorted(shared))})"
    return Split((fold,), words, in_sample=set(fold.judged) <= set(fold.chosen))


def _indices(counts: ExpertCounts, names: Sequence[str], option: str) -> tuple[int, ...]:
    known = {label: i for i, label in enumerate(counts.labels)}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        shown = ", ".join(counts.labels[:_SHOWN]) + (", …" if len(known) > _SHOWN else "")
        raise UsageError(
            f"found {option} {', '.join(unknown[:_SHOWN]) or 'without a name'}, expected {counts.kind}s of "
            f"{counts.source}: {shown}"
        )
    return tuple(sorted({known[name] for name in names}))


def _names(counts: ExpertCounts, indices: Sequence[int]) -> str:
    if len(indices) > _SHOWN:
        return _many(counts.kind, len(indices))
    names = ", ".join(counts.labels[i] for i in indices)
    return names if counts.kind == "text" else f"step{'s' * (len(indices) > 1)} {names}"


def _many(kind: str, number: int) -> str:
    return f"{number} {kind}{'s' * (number != 1)}"

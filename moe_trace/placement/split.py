"""Split observations into those a plan is chosen on and those it is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moe_trace.data.errors import UsageError
from moe_trace.placement.counts import ExpertCounts

Way = Literal["auto", "alternate", "halves", "each", "none"]
WAYS: tuple[Way, ...] = ("auto", "alternate", "halves", "each", "none")
MAX_FOLDS = 64
_MAX_NAMED = 8


@dataclass(frozen=True)
class Fold:
    """Indices of the observations that one plan is chosen on and evaluated on."""

    chosen: tuple[int, ...]
    judged: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """All folds, with a description of them in words."""

    folds: tuple[Fold, ...]
    words: str
    in_sample: bool
    """Whether plans are evaluated on what they were chosen on, which is optimistic for other inputs."""

    @property
    def chosen(self) -> list[int]:
        """Sorted indices of the observations that any fold chooses on."""
        return sorted({i for fold in self.folds for i in fold.chosen})


def split_by(counts: ExpertCounts, way: Way = "auto") -> Split:
    """Split as given; `auto` alternates steps, holds out single texts, and does not split one observation.

    Raises:
        UsageError: There are fewer than two observations for a split, or too many for `each`.
    """
    indices = tuple(range(len(counts.labels)))
    number, kind = len(indices), counts.kind
    if way == "auto":
        way = "none" if number == 1 else "alternate" if kind == "step" else "each"
    if way == "none":
        return _in_sample(counts)
    if number < 2:
        raise UsageError(
            f"{counts.source}: found one {kind}, expected two or more for --split {way}; record more, "
            "or use --split none, which judges in-sample"
        )
    if way == "each" and number > MAX_FOLDS:
        raise UsageError(
            f"found {number} {kind}s, expected at most {MAX_FOLDS} for --split each; use alternate or halves"
        )
    folds, words = _folds(indices, way, kind)
    # A batch that repeats makes the split in-sample: the held-out counts equal those chosen on.
    rows = [row.tobytes() for row in counts.counts_SLE]
    repeats = all({rows[i] for i in fold.judged} <= {rows[i] for i in fold.chosen} for fold in folds)
    if repeats:
        words += f" (in-sample: the {kind}s held out have the same counts as those chosen on)"
    return Split(folds, words, in_sample=repeats)


def _folds(every: tuple[int, ...], way: Way, kind: str) -> tuple[tuple[Fold, ...], str]:
    if way == "each":
        folds = tuple(Fold(every[:i] + every[i + 1 :], (i,)) for i in every)
        return folds, f"each {kind} is judged by plans chosen on all the others"
    middle = len(every) // 2
    a, b = (every[::2], every[1::2]) if way == "alternate" else (every[:middle], every[middle:])
    names = f"every second {kind}" if way == "alternate" else f"half of the {kind}s"
    words = (
        f"plans are chosen on {names} ({len(a)}), judged on the others ({len(b)}), and the other way round"
    )
    return (Fold(a, b), Fold(b, a)), words


def _in_sample(counts: ExpertCounts) -> Split:
    """Evaluate steps together, and texts one by one."""
    number = len(counts.labels)
    every = tuple(range(number))
    by_itself = counts.kind == "text" and 1 < number <= MAX_FOLDS
    folds = tuple(Fold(every, (i,)) for i in every) if by_itself else (Fold(every, every),)
    words = f"plans are chosen and judged on {_counted(counts.kind, number)}"
    words += ", each judged by itself" if by_itself else ""
    return Split(folds, f"{words} (in-sample: nothing was held out)", in_sample=True)


def split_named(counts: ExpertCounts, choose_on: Sequence[str], judge_on: Sequence[str]) -> Split:
    """Choose on some observations and evaluate on others, by label.

    Raises:
        UsageError: The source does not have a label, or no label is given.
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
        labels = ", ".join(counts.labels[:_MAX_NAMED]) + (", …" if len(known) > _MAX_NAMED else "")
        raise UsageError(
            f"found {option} {', '.join(unknown[:_MAX_NAMED]) or 'without a name'}, expected "
            f"{counts.kind}s of {counts.source}: {labels}"
        )
    return tuple(sorted({known[name] for name in names}))


def _names(counts: ExpertCounts, indices: Sequence[int]) -> str:
    if len(indices) > _MAX_NAMED:
        return _counted(counts.kind, len(indices))
    names = ", ".join(counts.labels[i] for i in indices)
    return names if counts.kind == "text" else f"step{'s' * (len(indices) > 1)} {names}"


def _counted(kind: str, number: int) -> str:
    return f"{number} {kind}{'s' * (number != 1)}"

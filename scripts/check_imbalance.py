"""Count false claims of the cost of imbalance, on recordings of `record_diff_pairs.py`.

The durations of a recording are assigned to other calls: all forwards are shifted by the same number of
steps, which keeps drift and bursts, and the layers are permuted. Load and time are then independent, and each
verdict other than `cannot tell` or `no effect seen` is a false claim. The verdicts on the unchanged
recordings are printed for comparison.

python scripts/record_diff_pairs.py pairs && python scripts/check_imbalance.py pairs
"""

from __future__ import annotations

import argparse
import os
import platform
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np

from moe_trace.read.reader import TraceSummary, read_summary
from moe_trace.read.time.imbalance import imbalance_costs
from moe_trace.read.time.phases import CallTimes

DRAWS = 5
"""Number of random reassignments of times per recording."""
VERDICTS = ("costs", "saves", "no effect seen", "cannot tell")


def verdict(summary: TraceSummary, times: CallTimes) -> str:
    """Return the verdict on all layers together, where a claim about one layer counts as a claim."""
    models = imbalance_costs(times, [router.info for router in summary.routers]).models
    found = {model.verdict for model in models}
    return next((one for one in VERDICTS if one in found), "cannot tell")


def exchanged(times: CallTimes, rng: np.random.Generator) -> CallTimes:
    """Return the same times, assigned to other calls."""
    calls = times.samples
    layers, layer = np.unique(calls.router, return_inverse=True)
    forwards, forward = np.unique(calls.call, return_inverse=True)
    row_of = np.full((len(layers), len(forwards)), -1)
    row_of[layer, forward] = np.arange(len(calls))
    if (row_of < 0).any():
        raise SystemExit("each forward is expected to call each router once")
    shift = int(rng.integers(1, len(forwards)))
    others = row_of[rng.permutation(len(layers))[layer], (forward + shift) % len(forwards)]
    return replace(times, forward=times.forward.select(others))


def judge(path: Path) -> tuple[str | None, str, list[str]]:
    """Return the device, the verdict on the recording, and the verdicts on its reassigned times."""
    summary = read_summary(path)
    if summary.times is None:
        raise SystemExit(f"{path}: no times of calls")
    rng = np.random.default_rng(int(path.name.split("-")[0]))
    apart = [verdict(summary, exchanged(summary.times, rng)) for _ in range(DRAWS)]
    device = summary.speed.device if summary.speed is not None else None
    return device, verdict(summary, summary.times), apart


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    recordings = sorted(
        path for kind in ("a", "b-same") for path in arguments.folder.glob(f"*-{kind}.pt.trace*")
    )
    as_they_are: Counter[str] = Counter()
    apart: Counter[str] = Counter()
    devices = set()
    with ProcessPoolExecutor() as pool:
        for device, as_it_is, others in pool.map(judge, recordings):
            devices.add(device)
            as_they_are[as_it_is] += 1
            apart.update(others)
    machine = ", ".join(sorted(filter(None, devices))) or f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    print(f"{date.today()}, {machine}\n")
    print("| recordings | number | " + " | ".join(VERDICTS) + " |\n| --- |" + " ---: |" * 5)
    for words, counts in (("as they are", as_they_are), ("times of other calls", apart)):
        cells = [sum(counts.values()), *(counts[one] for one in VERDICTS)]
        print(f"| {words} | " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()

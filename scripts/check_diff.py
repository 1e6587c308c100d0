"""Tabulate the verdicts of `moe-trace diff` on pairs with a known difference (see `record_diff_pairs.py`).

python scripts/record_diff_pairs.py pairs && python scripts/check_diff.py pairs
"""

from __future__ import annotations

import argparse
import os
import platform
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

from moe_trace.read.diff import Comparison, compare
from moe_trace.read.reader import read_summary

WORDS = {
    "same": "nothing (A/A)",
    "layer": "load of L02",
    "experts": "experts' work +5 %",
    "kernels": "experts implementation",
    "text": "text: prose for code",
}
ROUTING = ("load_", "router_entropy", "confidence")


def said(comparison: Comparison) -> dict[str, bool]:
    """Return which sections of the comparison report a change."""
    metrics = {c.metric for c in comparison.changed_metrics}
    of_routing = {m for m in metrics if m.startswith(ROUTING)}
    return {
        "unchanged": comparison.unchanged,
        "set-up": bool(comparison.setup),
        "routing": bool(comparison.changed_routing or of_routing),
        "L02 first": bool(comparison.changed_routing)
        and max(comparison.routing, key=lambda r: r.total_variation - r.chance).site == "L02",
        "time": bool(metrics - of_routing),
        "experts": bool({"experts_p50", "experts_share"} & metrics),
    }


def judge(a: Path) -> tuple[str | None, list[tuple[str, dict[str, bool], str]]]:
    """Return the device of A and, for each B, the planted change, the reported changes and details."""
    summary = read_summary(a)
    found = []
    for b in sorted(a.parent.glob(a.name.replace("-a.", "-b-*."))):
        comparison = compare(summary, read_summary(b))
        sort = b.name.split(".")[0].split("-")[2]
        routing = [
            (r.site, round(r.total_variation, 3), round(r.chance, 3)) for r in comparison.changed_routing
        ]
        metrics = [(c.stage, c.site, c.metric, c.relative) for c in comparison.changed_metrics]
        found.append((sort, said(comparison), f"{comparison.setup} {routing} {metrics}"))
    return (summary.speed.device if summary.speed is not None else None), found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--verbose", action="store_true", help="print the reported differences of each A/A pair"
    )
    arguments = parser.parse_args()
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    devices = set()
    recordings = sorted(arguments.folder.glob("*-a.pt.trace*"))
    with ProcessPoolExecutor() as pool:
        for a, (device, found) in zip(recordings, pool.map(judge, recordings), strict=True):
            devices.add(device)
            for sort, answer, details in found:
                counts[sort]["pairs"] += 1
                for what, true in answer.items():
                    counts[sort][what] += true
                if arguments.verbose and sort == "same" and not answer["unchanged"]:
                    print(a.name, details, flush=True)
    headings = ["pairs", "unchanged", "set-up", "routing", "L02 first", "time", "experts"]
    machine = ", ".join(sorted(filter(None, devices))) or f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    print(f"{date.today()}, {machine}\n")
    print("| planted | " + " | ".join(headings) + " |\n| --- |" + " ---: |" * len(headings))
    for sort, words in WORDS.items():
        if sort in counts:
            print(f"| {words} | " + " | ".join(str(counts[sort][h]) for h in headings) + " |")


if __name__ == "__main__":
    main()

"""What `moe-trace diff` says of pairs whose truth is known (recorded by `record_diff_pairs.py`), as a table.

python scripts/record_diff_pairs.py pairs && python scripts/check_diff.py pairs
"""

from __future__ import annotations

import argparse
import os
import platform
from collections import defaultdict
from datetime import date
from pathlib import Path

from moe_trace.read.diff import Comparison, compare
from moe_trace.read.reader import TraceSummary, read_summary

WORDS = {
    "same": "nothing (A/A)",
    "layer": "load of L02",
    "experts": "experts' work +5 %",
    "kernels": "experts implementation",
    "text": "text: prose for code",
}
ROUTING = ("load_", "router_entropy", "confidence")


def said(comparison: Comparison) -> dict[str, bool]:
    """Which sections of the answer name a change."""
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


def compared(folder: Path, name: str) -> tuple[Comparison, TraceSummary]:
    """The pair's comparison, and A."""
    a, b = (read_summary(folder / f"{name}-{side}.pt.trace.json.gz") for side in "ab")
    return compare(a, b), a


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--verbose", action="store_true", help="name what each A/A pair was said to differ in"
    )
    arguments = parser.parse_args()
    names = sorted(p.name.removesuffix("-b.pt.trace.json.gz") for p in arguments.folder.glob("*-b.pt.trace*"))
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    device = None
    for name in names:
        sort = name.split("-")[1]
        comparison, a = compared(arguments.folder, name)
        device = a.speed.device if a.speed is not None else None
        counts[sort]["pairs"] += 1
        for what, true in said(comparison).items():
            counts[sort][what] += true
        if arguments.verbose and sort == "same" and not comparison.unchanged:
            print(
                name,
                comparison.setup,
                [(r.site, r.total_variation, r.chance) for r in comparison.changed_routing],
            )
            print([(c.site, c.metric, c.relative) for c in comparison.changed_metrics])
    headings = ["pairs", "unchanged", "set-up", "routing", "L02 first", "time", "experts"]
    machine = device or f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    print(f"{date.today()}, {machine}\n")
    print("| planted | " + " | ".join(headings) + " |\n| --- |" + " ---: |" * len(headings))
    for sort, words in WORDS.items():
        if sort in counts:
            print(f"| {words} | " + " | ".join(str(counts[sort][h]) for h in headings) + " |")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Print the tables of docs/placement.md: results of the planner on counts of six texts.

python scripts/placement_tables.py tests/data/olmoe_expert_counts.json --ranks 8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from moe_trace.placement.counts import ExpertCounts  # noqa: E402
from moe_trace.placement.evaluation import least_without_copies  # noqa: E402
from moe_trace.placement.plan import Cluster  # noqa: E402
from moe_trace.placement.planner import PlanOptions  # noqa: E402
from moe_trace.placement.sources import read_counts  # noqa: E402
from moe_trace.placement.split import Split, split_by, split_named  # noqa: E402
from moe_trace.placement.study import ClusterStudy, study_placement  # noqa: E402

RANDOM_PLACEMENTS = 10_000


def studied(counts: ExpertCounts, split: Split, ranks: int) -> ClusterStudy:
    """Study placement with one copy slot per rank, on one node."""
    return study_placement(counts, split, [PlanOptions(cluster=Cluster(ranks))]).clusters[0]


def judged(cluster: ClusterStudy, plan: str) -> np.ndarray:
    """Return max ÷ mean, [folds, layers]."""
    return next(p.max_over_mean_FL for p in cluster.plans if p.name == plan)


def own_text(counts: ExpertCounts, ranks: int) -> list[ClusterStudy]:
    """Study each text with plans chosen on the same text."""
    return [studied(counts, split_named(counts, [name], [name]), ranks) for name in counts.labels]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Return a Markdown table whose first `left` columns are aligned left."""
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows))


def marked(value: float, contiguous: float) -> str:
    """Format a value, in bold if it does not improve on contiguous placement."""
    return f"{value:.3f}" if value < contiguous else f"**{value:.3f}**"


def table_of_texts(counts: ExpertCounts, ranks: int) -> str:
    """Tabulate for each layer and text its own plan, one plan for all, and one chosen on the other texts."""
    own = own_text(counts, ranks)
    together = studied(counts, split_by(counts, "none"), ranks)
    others = studied(counts, split_by(counts, "each"), ranks)
    headings = ["layer", "text", "contiguous", "bound"]
    headings += [
        f"{where}: {plan}"
        for where in ("own text", "all six", "other five")
        for plan in ("balanced", "replicated")
    ]
    rows = []
    for i, layer in enumerate(counts.layers):
        for t, text in enumerate(counts.labels):
            contiguous = float(judged(own[t], "contiguous")[0, i])
            bound = float(least_without_copies(counts.counts_SLE[t : t + 1], ranks)[i])
            row = [layer.site, text, f"{contiguous:.3f}", f"{bound:.3f}"]
            for cluster, fold in ((own[t], 0), (together, t), (others, t)):
                for plan in ("balanced", "replicated"):
                    row.append(marked(float(judged(cluster, plan)[fold, i]), contiguous))
            rows.append(row)
    return markdown(headings, rows, 2)


def table_across(counts: ExpertCounts, ranks: int, layer: int) -> str:
    """Return balanced plans of one layer, chosen on the row's text and evaluated on the column's."""
    own = own_text(counts, ranks)
    contiguous = [float(judged(study, "contiguous")[0, layer]) for study in own]
    rows = [["contiguous", *(f"{value:.3f}" for value in contiguous)]]
    rows.append(["random, mean", *(f"{values.mean():.3f}" for values in random_ones(counts, ranks, layer))])
    beaten = [
        float((values > value).mean())
        for values, value in zip(random_ones(counts, ranks, layer), contiguous, strict=True)
    ]
    rows.append(["random ones that contiguous beats", *(f"{100 * part:.0f} %" for part in beaten)])
    for chosen in counts.labels:
        found = [
            float(judged(studied(counts, split_named(counts, [chosen], [text]), ranks), "balanced")[0, layer])
            for text in counts.labels
        ]
        rows.append([f"chosen on {chosen}", *(marked(v, c) for v, c in zip(found, contiguous, strict=True))])
    return markdown(["", *counts.labels], rows, 1)


def random_ones(counts: ExpertCounts, ranks: int, layer: int) -> np.ndarray:
    """Return max ÷ mean, [texts, placements], of random placements with equal numbers of experts per rank."""
    random = np.random.default_rng(0)
    orders = random.permuted(np.tile(np.arange(counts.num_experts), (RANDOM_PLACEMENTS, 1)), axis=1)
    loads = counts.counts_SLE[:, layer][:, orders].reshape(len(counts.labels), RANDOM_PLACEMENTS, ranks, -1)
    loads = loads.sum(axis=3)
    return np.asarray(loads.max(axis=2) / loads.mean(axis=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    arguments = parser.parse_args()
    counts = read_counts(arguments.path)
    print(table_of_texts(counts, arguments.ranks))
    for i, layer in enumerate(counts.layers):
        print(f"\n{layer.site}\n\n{table_across(counts, arguments.ranks, i)}")


if __name__ == "__main__":
    main()

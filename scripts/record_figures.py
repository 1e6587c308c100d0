"""Write tests/data/figures.json: the exact figures of the recorded GPU traces.

python scripts/record_figures.py            writes the file
python scripts/record_figures.py --check    prints the differences (exit 1 if there are any)

A change of the reader that is not meant to change figures must leave the file as it is. For any other change,
the diff of the file shows what changed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_trace.read.reader import read_summary  # noqa: E402
from moe_trace.show.json import render_json  # noqa: E402

DATA = ROOT / "tests" / "data"
FIGURES = DATA / "figures.json"
FOLDERS = ("h100", "h200", "h200_graphs")


def traces() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (DATA / folder).glob("*.json.gz"))


def figures_of(trace: Path) -> dict[str, Any]:
    """Return totals, breakdown and coverage of the trace, and load and latencies of each router."""
    found = json.loads(render_json(read_summary(trace)))
    phases = found["phases"]
    return {
        "totals": found["totals"],
        "coverage": found.get("coverage"),
        "phases": phases and {name: phases[name] for name in ("whole", "total")},
        "routers": {
            router["site"]: {
                "assignments": router["assignments"],
                **{clock: times and times["total"] for clock, times in router["latency_us"].items()},
            }
            for router in found["routers"]
        },
        "stages": {stage: part["totals"] for stage, part in found.get("stages", {}).items()},
    }


def differences(stored: Any, found: Any, where: str = "") -> Iterator[str]:
    """Yield the differences of two values. Keys that are only in `found` are ignored."""
    if isinstance(stored, dict) and isinstance(found, dict):
        for key, value in stored.items():
            yield from differences(value, found.get(key), f"{where}/{key}")
    elif stored != found:
        yield f"{where}: {found} instead of {stored}"


def main() -> int:
    found = {path.relative_to(DATA).as_posix(): figures_of(path) for path in traces()}
    if "--check" in sys.argv:
        stored = json.loads(FIGURES.read_text())
        different = list(differences(stored, found))
        print("\n".join(different) or "as stored")
        return 1 if different else 0
    FIGURES.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

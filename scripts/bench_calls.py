"""Compare time and memory of reading the calls of a trace with another revision.

    python scripts/bench_calls.py --against 1ff239d

Writes one trace of 20,000 calls (16 layers, 64 experts, top-8, with timestamps on host and device). Fresh
processes then read it, alternating between the two revisions. Prints medians and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

READ = """
import gc, json, sys, time, tracemalloc
try:
    from moe_trace.read.reader import read_recording
    from moe_trace.data.summary import summarize
except ImportError:
    from moe_trace.reader import read_recording
    from moe_trace.summary import summarize
gc.collect()
if sys.argv[2] == "memory":
    tracemalloc.start()
start = time.perf_counter()
recording = read_recording(sys.argv[1])
read = time.perf_counter()
if sys.argv[2] == "memory":
    gc.collect()
    kept, peak = tracemalloc.get_traced_memory()
    print(json.dumps({"kept MB": kept / 1e6, "peak MB": peak / 1e6}))
else:
    summarize(recording)
    print(json.dumps({"read s": read - start, "summarize s": time.perf_counter() - read}))
"""


def write_trace(path: Path, calls: int) -> None:
    """Write a recording of `calls` placed calls into a trace without other events, in both formats."""
    from moe_trace.data.codec import encode_recording
    from moe_trace.data.schema import BAND_PID, Lost, Placement, Recording, RouterInfo, RoutingSample, Span
    from moe_trace.timeline.additions import encode_addition, read_added

    experts, k, layers, tokens = 64, 8, 16, 512
    random = np.random.default_rng(0)
    routers = tuple(
        RouterInfo(
            site=f"L{i:02d}",
            name=f"model.layers.{i}.mlp.gate",
            layer=i,
            router_class="OlmoeTopKRouter",
            experts_class="OlmoeExperts",
            contract="topk_experts",
            num_experts=experts,
            top_k=k,
            router_flops_per_token=262144,
            expert_flops_per_slot=12582912,
        )
        for i in range(layers)
    )
    samples = []
    for i in range(calls):
        router, start = routers[i % layers], 100.0 * i
        span = Span(start + 10.125, 20.5)
        block = Span(start, 90.25)
        places = {"router": span, "experts": Span(start + 40.25, 40.125), "block": block}
        samples.append(
            RoutingSample(
                site=router.site,
                name=router.name,
                layer=router.layer,
                call=i // layers,
                step=i // layers,
                phase="forward",
                stage="prefill",
                tokens=tokens,
                top_k=k,
                assignments=random.multinomial(tokens * k, np.full(experts, 1 / experts)).astype(np.int64),
                skipped=0,
                computed_slots=tokens * k,
                padding_assignments=0,
                nonfinite_tokens=0,
                router_entropy=float(random.uniform(2, 4)),
                confidence=float(random.uniform()),
                top1_prob=float(random.uniform()),
                topk_mass=float(random.uniform()),
                z_loss=float(random.uniform()),
                k_histogram=np.array([0] * k + [tokens]),
                router_flops=262144 * tokens,
                expert_flops=12582912 * tokens * k,
                memory_allocated_bytes=13 * 2**30,
                host_start_ns=1_700_000_000_000_000_000 + i * 100_000,
                host_end_ns=1_700_000_000_000_000_000 + i * 100_000 + 20_000,
                thread=4242,
                profiled=True,
                placement=Placement(host=places, device=places),
                aux_loss=float(random.uniform(8, 9)),
                slot_bytes=4096,
            )
        )
    recording = Recording(
        model={"name": "m"}, options={}, routers=routers, samples=tuple(samples), lost=Lost()
    )
    text = encode_recording(recording)
    label = {"ph": "M", "name": "process_labels", "pid": BAND_PID, "args": {"labels": "rank 0"}}
    head = b'{"traceEvents": ['
    path.write_bytes(head + encode_addition(b"", label, text, offset=len(head), first=True) + b"\n]}")
    with path.open("rb") as file:
        assert read_added(file) is not None, "expected a file that is read from its end"
    # The format of releases before 0.2, for a revision that reads no other.
    head, key = b'{"traceEvents": [\n]', b',\n"moe_trace": '
    splice = {"events_offset": len(head) - 2, "events_bytes": 0, "key_offset": len(head), "suffix_bytes": 2}
    end = b',"splice":' + json.dumps(splice).encode() + b"}\n}"
    path.with_suffix(".old.json").write_bytes(head + key + text[:-1] + end)


def measure(folder: Path, trace: Path, what: str) -> dict[str, float]:
    """Return the time or memory that a fresh process needs with the package in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ, str(trace), what]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="REV", help="revision to compare with")
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        trace, folders = Path(scratch) / "trace.json", {"this": ROOT}
        write_trace(trace, arguments.calls)
        old = trace.with_suffix(".old.json")
        if arguments.against:
            folders[arguments.against] = other = Path(scratch) / "other"
            archive = subprocess.run(
                ["git", "-C", str(ROOT), "archive", arguments.against, "moe_trace"],
                check=True,
                capture_output=True,
            ).stdout
            other.mkdir()
            subprocess.run(["tar", "-x", "-C", str(other)], input=archive, check=True)
        found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in folders}
        for what in ("time",) * arguments.rounds + ("memory",):
            for name, folder in folders.items():
                for figure, value in measure(folder, trace if name == "this" else old, what).items():
                    found[name][figure].append(value)
        print(f"{arguments.calls:,} calls, {trace.stat().st_size / 1e6:.1f} MB of JSON")
    for figure, values in found["this"].items():
        mine = statistics.median(values)
        line = f"{figure:12} {mine:8.3f}"
        if arguments.against:
            theirs = statistics.median(found[arguments.against][figure])
            line += f"   {arguments.against} {theirs:8.3f}   ratio {theirs / mine:5.2f}"
        print(line)


if __name__ == "__main__":
    main()

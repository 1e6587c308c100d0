"""Measure response times and sizes of the MoE tab for 16 layers x 128 experts x 1000 steps.

    python scripts/bench_dashboard.py [--layers 16 --experts 128 --steps 1000] [--browser]

The trace is written by the same merge as real traces. The exit status is 1 if a bound is exceeded: the first
view within 2 s with a warm cache, a step of the slider within 100 ms, at most 2 MB per view. Times are those
of the server, including HTTP and JSON. With --browser they are also measured in a real Chromium, until the
page is drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from werkzeug.test import Client

from moe_trace.data.schema import Lost, Recording, RouterInfo, RoutingSample
from moe_trace.show.tensorboard.plugin import MoEPlugin
from moe_trace.timeline.merge import merge_recording

TOP_K, TOKENS, CALL_US = 8, 4096, 100
VIEW_MAX_S, STEP_MAX_S, PAYLOAD_MAX = 2.0, 0.1, 2_000_000
OPERATORS = (("aten::linear", 12, 8), ("aten::mm", 50, 10), ("aten::mm", 70, 10), ("aten::sum", 82, 4))


def write_trace(path: Path, layers: int, experts: int, steps: int) -> None:
    """Write a trace with one router call per layer and step, whose load drifts over the steps."""
    rng = np.random.default_rng(0)
    infos = [_router(layer, experts) for layer in range(layers)]
    events, samples = [], []
    for step in range(steps):
        for layer, info in enumerate(infos):
            start = float((step * layers + layer) * CALL_US * 2)
            events += _events(info.site, start)
            samples.append(_sample(info, step, start, rng))
    path.write_text(json.dumps({"baseTimeNanoseconds": 0, "traceEvents": events}))
    recording = Recording(
        model={"name": "bench", "class": "Bench", "dtype": "bfloat16", "hidden_size": 2048},
        options={},
        routers=tuple(infos),
        samples=tuple(samples),
        lost=Lost(),
    )
    merge_recording(path, [recording])


def _router(layer: int, experts: int) -> RouterInfo:
    return RouterInfo(
        site=f"L{layer:02d}",
        name=f"model.layers.{layer}.mlp.gate",
        layer=layer,
        router_class="Router",
        experts_class="Experts",
        contract="topk-experts",
        num_experts=experts,
        top_k=TOP_K,
        router_flops_per_token=2 * 2048 * experts,
        expert_flops_per_slot=6 * 2048 * 1024,
    )


def _sample(info: RouterInfo, step: int, start_us: float, rng: np.random.Generator) -> RoutingSample:
    shares = rng.dirichlet(np.full(info.num_experts, 2.0))
    counts = rng.multinomial(TOKENS * TOP_K, shares)
    return RoutingSample(
        site=info.site,
        name=info.name,
        layer=info.layer,
        call=step,
        step=step,
        phase="forward",
        stage="prefill",
        tokens=TOKENS,
        top_k=TOP_K,
        assignments=counts.astype(np.int64),
        skipped=0,
        computed_slots=TOKENS * TOP_K,
        padding_assignments=0,
        nonfinite_tokens=0,
        router_entropy=3.0 + float(rng.random()),
        confidence=0.2,
        top1_prob=0.1,
        topk_mass=0.5,
        z_loss=4.0,
        k_histogram=np.array([0] * TOP_K + [TOKENS], dtype=np.int64),
        router_flops=TOKENS * info.router_flops_per_token,
        expert_flops=TOKENS * TOP_K * info.expert_flops_per_slot,
        memory_allocated_bytes=None,
        host_start_ns=int((start_us + 11) * 1000),
        host_end_ns=int((start_us + 29) * 1000),
        thread=1,
        profiled=True,
    )


def _events(site: str, start: float) -> list[dict[str, object]]:
    spans = (
        ("user_annotation", f"moe.block/{site}", 0, 100),
        ("user_annotation", f"moe.router/{site}", 10, 20),
    )
    spans += (("user_annotation", f"moe.experts/{site}", 40, 50),)
    operators = (("cpu_op", name, at, duration) for name, at, duration in OPERATORS)
    return [
        {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": 1, "ts": start + at, "dur": duration}
        for cat, name, at, duration in (*spans, *operators)
    ]


def main() -> int:
    """Print a table and return 1 if a bound is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("layers", 16), ("experts", 128), ("steps", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--browser", action="store_true", help="also measure in a real Chromium")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.pt.trace.json"
        write_trace(path, arguments.layers, arguments.experts, arguments.steps)
        print(
            f"trace of {path.stat().st_size / 1e6:.0f} MB; times are the slowest of 5, payloads uncompressed"
        )
        broken = report(folder, path.name, arguments.steps)
        return broken | (report_browser(Path(folder), arguments.steps) if arguments.browser else 0)


def report_browser(folder: Path, steps: int) -> int:
    """Time the tab in Chromium: from its address to the drawn view, from a slider move to the drawn map."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from browser.harness import Internet, chromium, find_chromium, offline_context, tensorboard
    from browser.moe_tab import open_view

    executable = find_chromium()
    if executable is None:
        sys.exit("found no Chromium")
    with (
        tempfile.TemporaryDirectory() as scratch,
        tensorboard(folder, Path(scratch)) as url,
        chromium(executable) as browser,
        offline_context(browser, Internet()) as context,
    ):
        page = context.new_page()
        open_view(page, url, "overview")  # reads the trace, so the cache is warm from here on
        start = time.perf_counter()
        frame = open_view(page, url, "overview")
        first_s = time.perf_counter() - start
        frame = open_view(page, url, "routing")
        times_ms = sorted(frame.evaluate(SLIDE_SCRIPT, steps // 2 + i) for i in range(21))
    print(
        f"{'first view in Chromium':32} {first_s:8.3f} s  from the address, TensorBoard's own page included"
    )
    middle_s = times_ms[10] / 1000
    print(
        f"{'slider step in Chromium':32} {middle_s:8.3f} s  median of 21, slowest {times_ms[-1] / 1000:.3f} s"
    )
    return int(first_s > VIEW_MAX_S or middle_s > STEP_MAX_S)


SLIDE_SCRIPT = """(step) => new Promise((done) => {
  const map = document.getElementById("routing-map");
  const slider = map.querySelector("input[type=range]");
  const start = performance.now();
  new MutationObserver((_, observer) => {
    if (map.dataset.steps !== `${step}-${step}`) return;
    observer.disconnect();
    requestAnimationFrame(() => done(performance.now() - start));
  }).observe(map, {attributes: true, attributeFilter: ["data-steps"]});
  slider.value = step;
  slider.dispatchEvent(new Event("input"));
})"""


def report(folder: str, name: str, steps: int) -> int:
    """Request every view as the page does."""
    apps = MoEPlugin(SimpleNamespace(logdir=folder)).get_plugin_apps()  # type: ignore[arg-type]
    broken = False

    def ask(view: str, query: str = "") -> int:
        answer = Client(apps[f"/{view}"]).get(f"/{view}?run=.&trace={name}{query}")
        assert answer.status_code == 200
        assert b'"broken"' not in answer.data[:200], answer.data[:300]
        return len(answer.data)

    print(f"{'first reading (cold)':32} {timed(lambda: ask('overview'))[0]:8.3f} s")
    middle = f"&from={steps // 2}&to={steps // 2}"
    rows = [("overview", "", VIEW_MAX_S), ("routing", "", VIEW_MAX_S), ("heat", middle, STEP_MAX_S)]
    rows += [("heat", f"&from=0&to={steps // 2}", STEP_MAX_S), ("layer", "&site=L03", VIEW_MAX_S)]
    rows += [("time", "", VIEW_MAX_S), ("timeline", "", VIEW_MAX_S), ("kernels", "", VIEW_MAX_S)]
    rows += [("ranks", "", VIEW_MAX_S), ("compare", f"&run_b=.&trace_b={name}", None)]
    for view, query, limit in rows:
        first, size = timed(lambda v=view, q=query: ask(v, q))
        slowest = max(timed(lambda v=view, q=query: ask(v, q))[0] for _ in range(5))
        bad = (limit is not None and slowest > limit) or size > PAYLOAD_MAX
        broken |= bad
        line = f"{view + query:32.32} {slowest:8.3f} s  {size / 1e3:8.1f} kB  first {first:7.3f} s"
        print(line + ("  TOO MUCH" if bad else ""))
    return int(broken)


def timed(work: Callable[[], int]) -> tuple[float, int]:
    """Return the duration in seconds and the result of `work`."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Compare time and memory of JSON parsers on the fields that reading a trace needs.

python -m pip install orjson ijson pysimdjson     # the contestants; missing ones are skipped
python scripts/bench_parsers.py --mb 270
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from pathlib import Path

from bench_read import measure, write_big

FIELDS = """
FIELDS = ("ph", "cat", "name", "ts", "dur", "pid", "tid", "id")
def take(event):
    for field in FIELDS: event.get(field)
    args = event.get("args")
    if args is not None: args.get("correlation")
"""
PROGRAMS = {
    "msgspec, typed, in batches (what we use)": (
        "msgspec",
        "from moe_trace.data.trace_json.decoding import decode_batch, decode_one\n"
        "from moe_trace.data.trace_json.stream import JsonStream\n"
        "stream = JsonStream(open(path, 'rb').read, path)\n"
        "for key in stream.walk():\n"
        "    if key == 'traceEvents':\n"
        "        for batch in stream.batches(decode_batch, decode_one): pass\n"
        "    else: stream.skip()\n",
    ),
    "msgspec, typed, whole file": (
        "msgspec",
        "import msgspec\nfrom moe_trace.data.trace_json.decoding import Event\n"
        "class Trace(msgspec.Struct):\n    traceEvents: list[Event]\n"
        "msgspec.json.decode(open(path, 'rb').read(), type=Trace)\n",
    ),
    "msgspec, untyped": ("msgspec", "import msgspec\nmsgspec.json.decode(open(path, 'rb').read())\n"),
    "orjson": ("orjson", "import orjson\norjson.loads(open(path, 'rb').read())\n"),
    "json": ("json", "import json\njson.load(open(path))\n"),
    "ijson (C backend), event by event": (
        "ijson",
        FIELDS + "import ijson\n"
        "for event in ijson.items(open(path, 'rb'), 'traceEvents.item', use_float=True): take(event)\n",
    ),
    "simdjson, lazy": (
        "simdjson",
        FIELDS + "import simdjson\nfor event in simdjson.Parser().load(path)['traceEvents']: take(event)\n",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=270)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "big.json"
        write_big(path, arguments.mb)
        print("| parser | seconds | peak MB |\n| --- | ---: | ---: |")
        for name, (module, program) in PROGRAMS.items():
            if importlib.util.find_spec(module) is None:
                continue
            command = [sys.executable, "-c", f"path = {str(path)!r}\n{program}"]
            runs = [measure(command) for _ in range(arguments.rounds)]
            seconds = statistics.median(run.seconds for run in runs)
            print(f"| {name} | {seconds:.2f} | {max(run.peak_mb for run in runs):.0f} |")


if __name__ == "__main__":
    main()

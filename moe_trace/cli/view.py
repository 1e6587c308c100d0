"""Show a folder of traces in TensorBoard's MoE tab, or one trace on its timeline.

No internet access is needed. A trace opens in the viewer of chrome://tracing, which the package
torch-tb-profiler provides; without that package, or with --tab, it opens in the MoE tab. The server accepts
connections from this machine only; to use it from another one, forward the port:
ssh -L 6006:localhost:6006 HOST. Press Ctrl-C to stop it.

Example: moe-trace view runs --port 6007 --open
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

from moe_trace.cli.pipes import TRACE
from moe_trace.data.errors import MoETraceError, TraceFileError, UsageError
from moe_trace.read.file.opening import opened
from moe_trace.show.tensorboard.catalog import Catalog, as_text, find_catalog
from moe_trace.show.viewer import TraceServer, find_trace_viewer

HOST = "127.0.0.1"
DEFAULT_PORT = 6006
START_TIMEOUT_S = 60.0
POLL_S = 0.2


READS = {"path": TRACE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "path",
        type=Path,
        metavar="DIR|TRACE",
        help="folder with traces in it or in its subfolders, or one trace",
    )
    add(
        "--tab",
        action="store_true",
        help="show a single trace in TensorBoard's MoE tab instead of on its timeline",
    )
    add(
        "--tokenizer", metavar="PATH", help="tokenizer for the text of routes, as for `moe-trace routes view`"
    )
    add(
        "--port",
        type=int,
        default=None,
        help=f"port of the server (default: {DEFAULT_PORT}, or the next free one if it is taken)",
    )
    add("--open", action="store_true", help="open the page in a browser")


def run(arguments: argparse.Namespace) -> int:
    path: Path = arguments.path
    if not path.exists():
        raise UsageError(f"{path} does not exist; record a run with `moe-trace run --out {path}`")
    if arguments.tokenizer:
        name_tokenizer(arguments.tokenizer)
    viewer = None if path.is_dir() or arguments.tab else find_trace_viewer()
    # The parent process may end this one by a signal, and the server must end with it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        if viewer is not None:
            return show_timeline(path, viewer, choose_port(arguments.port), arguments.open)
        return show_tab(path, arguments.port, arguments.open)
    except KeyboardInterrupt:
        return 0


def name_tokenizer(path: str) -> None:
    """Set the tokenizer with which the tab, which runs in another process, decodes token ids.

    Raises:
        UsageError: the tokenizer cannot be read.
    """
    from moe_trace.read.routes.text.tokenizer import TOKENIZER, read_vocabulary

    read_vocabulary(path)
    os.environ[TOKENIZER] = path if path == "demo" else os.path.abspath(path)


def show_timeline(trace: Path, viewer: Path, port: int, to_open: bool) -> int:
    """Serve one trace in chrome://tracing's viewer until Ctrl-C."""
    require_trace(trace)
    with TraceServer(trace, viewer, host=HOST, port=port) as server:
        say_address(f"the timeline of {trace}", server.address, to_open)
        print(f"its figures: moe-trace view {shlex.quote(str(trace))} --tab", flush=True)
        server.serve_forever()
    return 0


def show_tab(path: Path, wanted_port: int | None, to_open: bool) -> int:
    """Serve a folder, or one of its traces, in TensorBoard's MoE tab until Ctrl-C."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "the MoE tab needs tensorboard, which is not installed; run: pip install tensorboard"
        )
    if importlib.util.find_spec("plotly") is None:
        message = "charts need plotly, which is not installed; run: pip install 'moe_trace[report]'"
        print(f"moe-trace: the tab has no charts: {message}", file=sys.stderr)
    folder = path if path.is_dir() else path.absolute().parent
    catalog = require_traces(folder)
    name = as_text(path.name)
    query = "" if path.is_dir() else f"&p.moe.run=.&p.moe.trace={quote(name)}"
    if query and name not in {trace.name for trace in catalog.traces.values() if trace.run == "."}:
        raise UsageError(
            f"{path}: TensorBoard shows files named *.pt.trace.json or *.pt.trace.json.gz; rename it, or "
            "leave --tab out"
        )
    port = choose_port(wanted_port)
    # -P: a file in the current folder must not shadow an installed package.
    command = [sys.executable, "-P", "-m", "tensorboard.main", "--logdir", str(folder), "--host", HOST]
    process = subprocess.Popen([*command, "--port", str(port)])  # it inherits our standard streams
    try:
        wait_until_it_answers(process, port)
        say_address(f"the MoE tab of {path}", f"http://localhost:{port}/#moe{query}", to_open)
        return process.wait()
    finally:
        end(process)


def say_address(what: str, address: str, to_open: bool) -> None:
    """Print the address, and open it in a browser if wanted and possible."""
    print(f"{what}: {address}\nCtrl-C ends it", flush=True)
    if to_open and not webbrowser.open(address):
        print("moe-trace: found no browser to open; open the address yourself", file=sys.stderr)


def require_trace(path: Path) -> None:
    """Raise UsageError if the first bytes of a file show that it is not a trace."""
    try:
        with opened(path) as (_, plain):
            start = plain.read(64)
    except TraceFileError as error:
        raise UsageError(str(error)) from None
    if not start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
        raise UsageError(f"{path} is no trace: found {start[:20]!r}, expected JSON (also as .gz)")


def require_traces(folder: Path) -> Catalog:
    """Return the catalog of the traces below a folder.

    Raises:
        UsageError: the folder holds no trace.
    """
    catalog = find_catalog(folder)
    if not catalog.traces:
        raise UsageError(
            f"{folder}: found no run: no *.pt.trace.json or *.pt.trace.json.gz in it or in its folders; "
            f"record one with `moe-trace run --out {folder}`"
        )
    return catalog


def choose_port(wanted: int | None) -> int:
    """Return the wanted port, or by default the first free one from `DEFAULT_PORT` on.

    Raises:
        UsageError: the wanted port is taken, or is not a valid port.
    """
    if wanted is None:
        return next((p for p in range(DEFAULT_PORT, DEFAULT_PORT + 100) if is_free(p)), DEFAULT_PORT)
    if not 1 <= wanted <= 65535:
        raise UsageError(f"found --port {wanted}, expected a number from 1 to 65535")
    if not is_free(wanted):
        raise UsageError(
            f"port {wanted} is taken, perhaps by another TensorBoard; choose another with --port, or leave "
            "--port out to get a free one"
        )
    return wanted


def is_free(port: int) -> bool:
    """Return whether TensorBoard could listen on a port."""
    with socket.socket() as probe:
        # As in TensorBoard: lingering connections of a server that ended do not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def wait_until_it_answers(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until TensorBoard serves the tab.

    Raises:
        MoETraceError: TensorBoard ended, or did not answer in time.
    """
    for _ in range(int(START_TIMEOUT_S / POLL_S)):
        if process.poll() is not None:
            raise MoETraceError(f"TensorBoard ended with status {process.returncode}; its words stand above")
        try:
            urlopen(f"http://{HOST}:{port}/data/plugin/moe/static/index.js", timeout=5)
            return
        except (URLError, OSError):
            time.sleep(POLL_S)
    raise MoETraceError(
        f"TensorBoard did not show the MoE tab within {START_TIMEOUT_S:.0f} s; is moe_trace installed in the "
        f"same environment as TensorBoard ({sys.executable})?"
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop TensorBoard, by force if it does not end within 10 seconds."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

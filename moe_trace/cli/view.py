"""`moe-trace view`."""

from __future__ import annotations

import argparse
import importlib.util
import socket
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from moe_trace.data.errors import MoETraceError, UsageError
from moe_trace.show.tensorboard.catalog import Catalog, find_catalog

HOST = "127.0.0.1"
DEFAULT_PORT = 6006
START_TIMEOUT_S = 60.0
POLL_S = 0.2


class ViewCommand:
    """Start TensorBoard on a folder of traces, and print the address of its MoE tab.

    The tab needs no internet. TensorBoard answers on this machine only; from another one, forward the port:
    ssh -L 6006:localhost:6006 HOST. Ctrl-C ends it.

    Example: moe-trace view runs --port 6007 --open
    """

    name = "view"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        add = parser.add_argument
        add("folder", type=Path, metavar="DIR", help="a folder with traces in it, or in folders below it")
        add(
            "--port",
            type=int,
            default=None,
            help=f"{DEFAULT_PORT} by default; the next free one if it is taken",
        )
        add("--open", action="store_true", help="open the tab in a browser")

    def run(self, arguments: argparse.Namespace) -> int:
        """Check what can be checked before, start TensorBoard, wait for its end."""
        for package, what in (("tensorboard", "tensorboard"), ("plotly", "the charts of the tab (plotly)")):
            if importlib.util.find_spec(package) is None:
                raise MoETraceError(f"{what} is not installed; run: pip install {package}")
        require_traces(arguments.folder)
        port = choose_port(arguments.port)
        address = f"http://localhost:{port}/#moe"
        process = start_tensorboard(arguments.folder, port)
        try:
            wait_until_it_answers(process, port)
            print(f"the MoE tab of {arguments.folder}: {address}\nCtrl-C ends TensorBoard", flush=True)
            if arguments.open and not webbrowser.open(address):
                print("moe-trace: found no browser to open; open the address yourself", file=sys.stderr)
            return process.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            end(process)


def require_traces(folder: Path) -> Catalog:
    """What lies below the folder.

    Raises:
        UsageError: it is missing, no folder, or holds no trace.
    """
    if not folder.exists():
        raise UsageError(f"{folder} does not exist; record a run with `moe-trace run --out {folder}`")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; give the folder that it is in: moe-trace view {folder.parent}")
    catalog = find_catalog(folder)
    if not catalog.traces:
        raise UsageError(
            f"{folder}: found no run: no *.pt.trace.json or *.pt.trace.json.gz in it or in its folders; "
            f"record one with `moe-trace run --out {folder}`"
        )
    return catalog


def choose_port(wanted: int | None) -> int:
    """The wanted port, or by default the first free one from `DEFAULT_PORT` on.

    Raises:
        UsageError: the wanted port is taken, or is none.
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
    """Whether TensorBoard could listen on it."""
    with socket.socket() as probe:
        # As TensorBoard does it: connections of an ended server that linger do not make the port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def start_tensorboard(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """In a process of its own, with its output going where ours goes."""
    # -P: what happens to lie in the current folder must not stand in for an installed package.
    command = [sys.executable, "-P", "-m", "tensorboard.main", "--logdir", str(folder), "--host", HOST]
    return subprocess.Popen([*command, "--port", str(port)])


def wait_until_it_answers(
    process: subprocess.Popen[bytes], port: int, *, ask: Callable[..., object] = urlopen
) -> None:
    """Return once TensorBoard serves the tab.

    Raises:
        MoETraceError: it ended, or did not answer in time.
    """
    pause = threading.Event()
    for _ in range(int(START_TIMEOUT_S / POLL_S)):
        if process.poll() is not None:
            raise MoETraceError(f"TensorBoard ended with status {process.returncode}; its words stand above")
        try:
            ask(f"http://{HOST}:{port}/data/plugin/moe/static/index.js", timeout=5)
            return
        except (URLError, OSError):
            pause.wait(POLL_S)
    raise MoETraceError(
        f"TensorBoard did not show the MoE tab within {START_TIMEOUT_S:.0f} s; is moe_trace installed in the "
        f"same environment as TensorBoard ({sys.executable})?"
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop TensorBoard, by force if it does not end by itself."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

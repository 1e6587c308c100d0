"""The TensorBoard plugin: routes and HTTP, nothing else.

If a plugin fails to import, the user's whole TensorBoard stops. So this module imports only the standard
library, werkzeug and tensorboard; the code that reads traces is imported on the first request, and if that
fails the tab reports it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import Request, Response, wsgi

from moe_trace.show.tensorboard.catalog import OUTSIDE, RECENT_S, Catalogs, is_below

PLUGIN_NAME = "moe"
STATIC = Path(__file__).parent / "static"
STATIC_TYPES = {".js": "text/javascript", ".css": "text/css"}
VIEWS = (
    "runs",
    "trace",
    "overview",
    "routing",
    "heat",
    "layer",
    "time",
    "timeline",
    "kernels",
    "compare",
    "ranks",
    "routes",
    "routes_page",
    "routes_study",
)
A_DAY_S = 86_400

_log = logging.getLogger(__name__)
Route = Callable[[Request], Response]


class MoEPlugin(base_plugin.TBPlugin):
    """Plugin of the tab "MoE"."""

    plugin_name = PLUGIN_NAME

    def __init__(self, context: base_plugin.TBContext) -> None:
        super().__init__(context)
        self._catalogs = Catalogs(context.logdir or "", _logdir_spec(context))
        self._dashboard: Any = None

    def get_plugin_apps(self) -> Mapping[str, Any]:
        """Return a mapping from route to WSGI application."""
        routes: dict[str, Route] = {"/static/*": self._static_route, "/plotly.min.js": self._plotly_route}
        routes |= {f"/{view}": self._view_route(view) for view in VIEWS}
        routes["/download"] = self._download_route
        return {path: _application(route) for path, route in routes.items()}

    def is_active(self) -> bool:
        """Return whether the log folder holds any trace."""
        try:
            catalog = self._catalogs.get(RECENT_S)
            return bool(catalog.traces or catalog.refused)
        except Exception:  # TensorBoard asks all plugins at once, so an error would break the others
            _log.exception("the MoE tab could not look through %s", self._catalogs.logdir)
            return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Return the tab's name and its ES module."""
        return base_plugin.FrontendMetadata(es_module_path="/static/index.js", tab_name="MoE")

    def _data(self) -> Any:
        if self._dashboard is None:
            from moe_trace.show.tensorboard.data import Dashboard

            self._dashboard = Dashboard(self._catalogs)
        return self._dashboard

    # -- routes ---------------------------------------------------------------------------------------

    def _view_route(self, view: str) -> Route:
        def route(request: Request) -> Response:
            try:
                data = self._data()
            except ImportError as error:
                return _json(request, {"error": f"The MoE tab needs a package that is missing: {error}"})
            try:
                return _json(request, data.answer(view, request.args.to_dict()))
            except KeyError as error:
                return _problem(request, f"there is no {error.args[0]} here; reload the list of runs", 404)
            except ValueError as error:
                return _problem(request, str(error), 400)

        return route

    def _static_route(self, request: Request) -> Response:
        """Serve only files of this package: the name is looked up, never joined to a path."""
        name = request.path.rpartition("/static/")[2]
        known = {path.relative_to(STATIC).as_posix(): path for path in STATIC.rglob("*") if path.is_file()}
        path = known.get(name)
        if path is None or path.suffix not in STATIC_TYPES:
            return _problem(request, "there is no such file", 404)
        return http_util.Respond(request, path.read_bytes(), STATIC_TYPES[path.suffix])

    def _plotly_route(self, request: Request) -> Response:
        spec = find_spec("plotly")
        bundle = Path(spec.origin).parent / "package_data" / "plotly.min.js" if spec and spec.origin else None
        if bundle is None or not bundle.is_file():
            return _problem(request, "plotly is not installed; run: pip install 'moe_trace[report]'", 404)
        return http_util.Respond(request, bundle.read_bytes(), "text/javascript", expires=A_DAY_S)

    def _download_route(self, request: Request) -> Response:
        try:
            trace = self._catalogs.find(request.args.get("run", ""), request.args.get("trace", ""))
            if not is_below(trace.path, trace.root):
                return _problem(request, OUTSIDE, 404)
            if trace.is_reduced:
                return _problem(request, "the trace is gone; only what it was reduced to is here", 404)
            file = trace.path.open("rb")
        except (KeyError, OSError):
            return _problem(request, "there is no such trace", 404)
        name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in trace.name)
        headers = {
            "Content-Disposition": f'attachment; filename="{name}"',
            "Content-Length": str(trace.path.stat().st_size),
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        }
        body = wsgi.wrap_file(request.environ, file)
        return Response(
            body, headers=headers, content_type="application/octet-stream", direct_passthrough=True
        )


def _logdir_spec(context: base_plugin.TBContext) -> str:
    return getattr(getattr(context, "flags", None), "logdir_spec", "") or ""


def _application(route: Route) -> Any:
    """Wrap a route: refuse methods other than GET, and turn exceptions into a message instead of a page."""

    @Request.application
    def application(request: Request) -> Response:
        if request.method != "GET":
            return _problem(request, f"{request.method} is not allowed, only GET", 405, [("Allow", "GET")])
        try:
            return route(request)
        except Exception as error:
            _log.exception("the MoE tab could not answer %s", request.path)
            return _problem(request, f"the MoE tab failed ({type(error).__name__}: {error})", 500)

    return application


def _json(request: Request, content: Any, code: int = 200) -> Response:
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return http_util.Respond(request, text, "application/json", code=code)


def _problem(
    request: Request, words: str, code: int, headers: list[tuple[str, str]] | None = None
) -> Response:
    text = json.dumps({"error": words})
    return http_util.Respond(request, text, "application/json", code=code, headers=headers)

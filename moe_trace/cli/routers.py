"""`moe-trace routers`."""

from __future__ import annotations

import argparse

from moe_trace.cli.console import console


class RoutersCommand:
    """List the routers of a model: what would be traced, without running it.

    The model is built without weights, so that any size fits.

    Example: moe-trace routers demo
    """

    name = "routers"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("model", metavar="demo|HUB_ID|PATH|CONFIG.json")

    def run(self, arguments: argparse.Namespace) -> int:
        """Print one row per router."""
        from rich.table import Table

        from moe_trace.routers import find_routers
        from moe_trace.workload.models import load_model

        model, _ = load_model(arguments.model, device="meta", random_weights=True)
        sites = find_routers(model)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("label", "module", "router class", "contract"):
            table.add_column(heading, overflow="fold")
        for heading in ("experts", "k", "MFLOP/token"):
            table.add_column(heading, justify="right")
        for site in sites:
            info = site.info
            flops = info.router_flops_per_token + info.expert_flops_per_slot * info.top_k
            table.add_row(
                info.site,
                info.name,
                info.router_class,
                info.contract,
                str(info.num_experts),
                str(info.top_k),
                f"{flops / 1e6:.3g}",
            )
        out = console()
        out.print(f"{type(model).__name__}: {len(sites)} routers")
        out.print(table)
        return 0

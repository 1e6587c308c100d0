"""Several runs from one command: one for each length, or for each named text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from moe_trace.data.errors import UsageError
from moe_trace.workload.config import RunConfig
from moe_trace.workload.inputs import read_prompts


def variants(config: RunConfig, seq_lens: Sequence[int]) -> list[tuple[str, RunConfig]]:
    """Return (name, config) of each run. A single run keeps the folder, several get subfolders.

    A JSON prompts file with several texts makes a run of each; other prompts files are one batch.

    Args:
        seq_lens: tokens per sequence; with more than one, each makes a run.

    Raises:
        UsageError: two names would share a folder.
    """
    runs = [("", config)]
    if config.prompts_file is not None and config.prompts_file.suffix == ".json":
        texts = read_prompts(config.prompts_file)
        if len(texts) > 1:
            runs = [(name, replace(config, prompt=text, prompts_file=None)) for name, text in texts.items()]
    if seq_lens:
        runs = [
            (f"{name} {length}".strip(), replace(run, seq_len=length))
            for name, run in runs
            for length in seq_lens
        ]
    if len(runs) == 1:
        return [("run", runs[0][1])]
    folders = [re.sub(r"[^\w.-]+", "-", f"seq-{name}" if name.isdigit() else name) for name, _ in runs]
    if len(set(folders)) < len(folders):
        raise UsageError(f"the names {[name for name, _ in runs]} do not make a folder each; rename some")
    return [
        (name, replace(run, out=config.out / folder))
        for (name, run), folder in zip(runs, folders, strict=True)
    ]

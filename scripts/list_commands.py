"""Write docs/cli.md: every command of `moe-trace` with its options, as in its `--help`.

python scripts/list_commands.py            writes the page
python scripts/list_commands.py --check    checks whether it is up to date (exit 1 if not)
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cli.md"
HEAD = """# The command line

`moe-trace COMMAND [options]`. The commands that read traces need neither torch nor the model. This page is
what `moe-trace COMMAND --help` prints, written by `scripts/list_commands.py`.

"""


def page() -> str:
    """Return the whole page. Its width is fixed, so that it is the same on every terminal."""
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    from moe_trace.cli import COMMANDS, command_parser

    parts = [HEAD, "| command | what it does |\n|---|---|\n"]
    parts += [f"| [{name}](#{name}) | {line} |\n" for name, (_, line) in COMMANDS.items()]
    for name in COMMANDS:
        parser = _subparsers(command_parser(name))[name]
        parts.append(_section(name, parser))
        parts += [_section(f"{name} {inner}", sub) for inner, sub in _subparsers(parser).items()]
    return "".join(parts)


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    return f"\n## {name}\n\n```text\n{parser.format_help().rstrip()}\n```\n"


def main() -> int:
    """Write or compare the page; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    text = page()
    if not arguments.check:
        PAGE.write_text(text, "utf-8")
        return 0
    if PAGE.read_text("utf-8") == text:
        return 0
    print(f"{PAGE.relative_to(ROOT)} is out of date: python scripts/list_commands.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

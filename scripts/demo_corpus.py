"""Training text of the demo model: four domains, from packages with clear licences, without network access.

A `Source` reads documents from an installed package. `build_corpus` drops repeated blocks, splits by document
and returns one `Corpus` per domain. `save_corpora` and `load_corpora` transfer them to a machine without the
packages.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import re
import subprocess
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from html.entities import html5
from pathlib import Path
from zoneinfo import ZoneInfo

HELD_OUT_SHARE = 0.1
MAX_DOCUMENT_CHARS = 24_000  # keeps a single file from dominating its domain
MIN_REPEATED_BLOCK_CHARS = 60  # shorter blocks (`}`, `pass`) are normal language, longer ones boilerplate
KJV_CHAPTER_STRIDE = 3  # every third chapter; all of them would be 92 % of the prose
SKIPPED_CODE = re.compile(
    r"(^|/)(tests?|idle_test|site-packages|dist-packages|encodings|pydoc_data|turtledemo|__pycache__)/"
    r"|(^|/)config-[^/]*/"
    r"|_sysconfigdata|(^|/)__phello__"
)
SKIPPED_HTML = re.compile(
    r"crossref|requirements\.html|syntaxdiagrams|capi3ref|keyword_index|sitemap|toc\.html"
)

Document = tuple[str, str]  # (a stable name, the text)


class MissingData(SystemExit):
    """Raised if a package that the corpus needs is not installed; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Origin and licence of text."""

    package: str
    """Debian package, or `python` for files of the running interpreter."""
    licence: str
    """Short name, and the sentence of the package's copyright file that grants the licence."""
    what: str
    """Description of what is read from the package."""
    read: Callable[[], Iterable[Document]]


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """Record of what was actually read from a `Source`, for the model card."""

    package: str
    version: str
    licence: str
    what: str
    documents: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One domain: training documents, held-out documents, and their sources."""

    domain: str
    train: list[str]
    held_out: list[str]
    sources: list[SourceRecord]


def _require(path: Path, package: str) -> Path:
    if not path.exists():
        raise MissingData(
            f"{path} is missing. Found: no such file. Expected: the data of Debian package {package}. "
            f"Next: install {package} (apt-get install {package}), or pass --corpus with a saved corpus."
        )
    return path


def read_king_james() -> Iterator[Document]:
    """Yield chapters without verse numbers, by the package's reader, because the file format is its own."""
    reader = _require(Path("/usr/bin/bible"), "bible-kjv")
    _require(Path("/usr/lib/bible.data"), "bible-kjv-text")
    command = [str(reader), "-f", "gen1:1-rev22:21"]
    verses = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chapters: dict[str, list[str]] = {}
    for line in verses.splitlines():
        reference, _, verse = line.partition(" ")
        chapters.setdefault(reference.partition(":")[0], []).append(verse)
    for number, (chapter, lines) in enumerate(chapters.items()):
        if number % KJV_CHAPTER_STRIDE == 0:
            yield chapter, "\n".join(lines)


def read_devils_dictionary() -> Iterator[Document]:
    """Yield entries in groups of eight, so that a document is about as long as a chapter."""
    path = _require(Path("/usr/share/dictd/devil.dict.dz"), "dict-devil")
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    entries = re.split(r"\n{2,}(?=[A-Z]{2,})", text[text.index("ABASEMENT") :])
    for first in range(0, len(entries), 8):
        yield f"devil-{first}", "\n\n".join(entries[first : first + 8])


def read_standard_library() -> Iterator[Document]:
    """Yield Python files of the running interpreter, without tests and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not SKIPPED_CODE.search(name):
            yield name, path.read_text(encoding="utf-8", errors="replace")


def read_sqlite_manual() -> Iterator[Document]:
    """Yield bodies of the HTML pages, without page frame, scripts and drawings."""
    root = _require(Path("/usr/share/doc/sqlite3/about.html"), "sqlite3-doc").parent
    for path in sorted(root.rglob("*.html")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_HTML.search(name):
            continue
        page = path.read_text(encoding="utf-8", errors="replace")
        body = page.partition("antiRobotDefense();\n</script>")[2] or page
        yield name, re.sub(r"<(svg|script|style)\b.*?</\1>\s*", "", body, flags=re.DOTALL)


def _as_documents(name: str, records: list[dict[str, object]], group: int) -> Iterator[Document]:
    """Yield JSON lists of `group` records. Every second one is indented, since both styles are common."""
    for number, first in enumerate(range(0, len(records), group)):
        indent = 2 if number % 2 else None
        yield f"{name}-{first}", json.dumps(records[first : first + group], indent=indent, ensure_ascii=False)


def _degrees(text: str) -> float:
    """Convert ISO 6709 `+DDMM`, `+DDDMM`, or the same with seconds, to degrees."""
    sign, digits = (-1 if text[0] == "-" else 1), text[1:]
    width = 2 if len(digits) in (4, 6) else 3
    minutes, seconds = int(digits[width : width + 2]), int(digits[width + 2 :] or 0)
    return round(sign * (int(digits[:width]) + minutes / 60 + seconds / 3600), 4)


def _offset(zone: ZoneInfo, year: int, month: int) -> dict[str, object]:
    local = datetime(year, month, 1, tzinfo=UTC).astimezone(zone)
    offset, saving = local.utcoffset(), local.dst()
    assert offset is not None
    return {
        "at": local.isoformat(),
        "utc_offset_minutes": int(offset.total_seconds() // 60),
        "abbreviation": local.tzname(),
        "dst": bool(saving),
    }


def read_time_zones() -> Iterator[Document]:
    """Yield the zone table as JSON records: place, countries, and local time at eight dates."""
    root = _require(Path("/usr/share/zoneinfo/zone1970.tab"), "tzdata").parent
    rows = [
        line.split("\t") for line in (root / "iso3166.tab").read_text("utf-8").splitlines() if line[0] != "#"
    ]
    countries = {code: country for code, country in rows}
    records: list[dict[str, object]] = []
    for line in (root / "zone1970.tab").read_text("utf-8").splitlines():
        if line.startswith("#"):
            continue
        codes, place, name, *comment = line.split("\t")
        latitude, longitude = re.findall(r"[+-]\d+", place)
        with (root / name).open("rb") as file:
            zone = ZoneInfo.from_file(file, key=name)
        records.append(
            {
                "zone": name,
                "countries": [{"code": code, "name": countries[code]} for code in codes.split(",")],
                "latitude": _degrees(latitude),
                "longitude": _degrees(longitude),
                "comment": comment[0] if comment else None,
                "offsets": [
                    _offset(zone, year, month) for year in (1975, 1990, 2005, 2020) for month in (1, 7)
                ],
            }
        )
    yield from _as_documents("zones", records, 2)


def read_characters() -> Iterator[Document]:
    """Yield the interpreter's character database and HTML entity table as JSON records."""
    entities = {text: name for name, text in sorted(html5.items()) if name.endswith(";")}
    records: list[dict[str, object]] = []
    for code in range(0x20, 0x3000):
        char = chr(code)
        name = unicodedata.name(char, "")
        if name:
            records.append(
                {
                    "code": f"U+{code:04X}",
                    "name": name,
                    "category": unicodedata.category(char),
                    "bidirectional": unicodedata.bidirectional(char),
                    "decomposition": unicodedata.decomposition(char) or None,
                    "numeric": unicodedata.numeric(char, None),
                    "mirrored": bool(unicodedata.mirrored(char)),
                    "entity": entities.get(char),
                }
            )
    yield from _as_documents("characters", records, 12)


DOMAINS: dict[str, list[Source]] = {
    "prose": [
        Source(
            package="bible-kjv-text",
            licence='public domain ("The copyright for the King James Version text of the Bible is '
            'expired"); '
            "read with the program of package bible-kjv",
            what=f"King James Version, every {KJV_CHAPTER_STRIDE}rd chapter, verse numbers removed",
            read=read_king_james,
        ),
        Source(
            package="dict-devil",
            licence="public domain (\"The Devil's Dictionary is in the public domain, its copyright has "
            'expired.")',
            what="Ambrose Bierce, The Devil's Dictionary (1911)",
            read=read_devils_dictionary,
        ),
    ],
    "code": [
        Source(
            package="python",
            licence="PSF License Agreement; Copyright (c) 2001 onwards, Python Software Foundation; "
            "All Rights Reserved",
            what="source of the Python standard library, without tests, encodings and generated tables",
            read=read_standard_library,
        )
    ],
    "json": [
        Source(
            package="tzdata",
            licence='public domain ("This database is in the public domain.")',
            what="zone1970.tab, iso3166.tab and the zone files, rewritten as JSON records",
            read=read_time_zones,
        ),
        Source(
            package="python",
            licence="PSF License Agreement; character names: Unicode License, Copyright (c) 1991 onwards, "
            "Unicode, Inc.",
            what="`unicodedata` and `html.entities`, U+0020 to U+2FFF, rewritten as JSON records",
            read=read_characters,
        ),
    ],
    "html": [
        Source(
            package="sqlite3-doc",
            licence='public domain ("The files listed have been put on the public domain by the sqlite3 '
            'contributors.")',
            what="bodies of the pages of the SQLite manual, without scripts and drawings",
            read=read_sqlite_manual,
        )
    ],
}


def package_version(package: str) -> str:
    """Return the version of an installed Debian package, or of the interpreter for `python`."""
    if package == "python":
        return platform.python_version()
    command = ["dpkg-query", "--show", "--showformat", "${Version}", package]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _drop_repeats(text: str, seen: set[str]) -> str:
    """Remove blocks (runs between blank lines) seen before, because repeats would leak held-out text."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        key = block.strip()
        if len(key) >= MIN_REPEATED_BLOCK_CHARS and key in seen:
            continue
        seen.add(key)
        blocks.append(block.rstrip())
    return "\n\n".join(blocks).strip()[:MAX_DOCUMENT_CHARS]


def is_held_out(name: str) -> bool:
    """Decide by a hash of the document's name, so that other changes move no document across the split."""
    return hashlib.sha256(name.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def build_corpus(domain: str) -> Corpus:
    """Read every source of `domain`; raise `MissingData`, which names the package to install."""
    seen: set[str] = set()
    train: list[str] = []
    held_out: list[str] = []
    records: list[SourceRecord] = []
    for source in DOMAINS[domain]:
        cleaned = [(name, _drop_repeats(text, seen)) for name, text in source.read()]
        documents = [(name, text) for name, text in cleaned if text]
        for name, text in documents:
            (held_out if is_held_out(name) else train).append(text)
        data = "\0".join(text for _, text in documents).encode()
        records.append(
            SourceRecord(
                package=source.package,
                version=package_version(source.package),
                licence=source.licence,
                what=source.what,
                documents=len(documents),
                size_bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        )
    return Corpus(domain=domain, train=train, held_out=held_out, sources=records)


def save_corpora(corpora: list[Corpus], folder: Path) -> None:
    """Write one JSON file per domain, which `load_corpora` reads back unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    for corpus in corpora:
        (folder / f"{corpus.domain}.json").write_text(json.dumps(asdict(corpus)), encoding="utf-8")


def load_corpora(folder: Path) -> list[Corpus]:
    """Read the files of `save_corpora`, in the order of `DOMAINS`."""
    corpora = []
    for domain in DOMAINS:
        path = folder / f"{domain}.json"
        if not path.exists():
            raise MissingData(
                f"{path} is missing. Expected a corpus. Next: write one with --save-corpus {folder}."
            )
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["sources"] = [SourceRecord(**record) for record in fields["sources"]]
        corpora.append(Corpus(**fields))
    return corpora

"""Training text for `make_tiny_additive_moe.py`, gathered from Debian packages.

Owns: which packages, how their files become plain text, how much of each domain. Packages are
downloaded with `apt-get download` and unpacked into a work folder; nothing is installed, and no
text enters the repository. Leaves out: tokenization and batching.

Needs `apt-get`, `dpkg-deb` and `groff` (Debian: `groff-base`), which renders the manual pages as
`man` would show them.
"""

from __future__ import annotations

import gzip
import html.parser
import json
import random
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

GROFF = ["groff", "-K", "utf8", "-t", "-Tutf8", "-man", "-P-cbou", "-rHY=0", "-rLL=78n"]
MAX_DOCUMENT = 40_000  # characters; longer files are cut, so that no single one fills a domain


@dataclass(frozen=True)
class Domain:
    """One kind of text: where it comes from, and the function that makes a file plain text."""

    name: str
    packages: tuple[str, ...]
    pattern: str  # glob inside the unpacked packages, or inside the standard library if no packages
    read: Callable[[Path], str]
    megabytes: float = 3.5


def render_man(path: Path) -> str:
    """Render one gzipped manual page; a page that only includes another (`.so`) gives ''."""
    with gzip.open(path) as source:
        roff = source.read()
    if roff.startswith(b".so "):
        return ""
    shown = subprocess.run(GROFF, input=roff, capture_output=True, check=False).stdout.decode()
    shown = re.sub(r"[─┌┐└┘├┤┬┴┼]+", "-", shown)  # frames of tables
    return re.sub(r"(?<=\S)  (?=\S)", " ", shown)  # undo the justification of full lines


class _Blocks(html.parser.HTMLParser):
    """Collects the text of headings, paragraphs and listings of a Publican HTML book page."""

    BLOCKS = frozenset({"h1", "h2", "h3", "h4", "p", "pre", "dt"})

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS or (tag == "div" and ("class", "para") in attrs):
            self.open.append(tag)
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.blocks[-1] += data if self.open[-1] == "pre" else re.sub(r"\s+", " ", data)


def read_html(path: Path) -> str:
    """Text of a book page: its blocks, separated by empty lines."""
    parser = _Blocks()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    return "\n\n".join(block.strip() for block in parser.blocks if block.strip())


def read_plain(path: Path) -> str:
    """Text of a source file as it is."""
    return path.read_text(encoding="utf-8", errors="replace")


def _man(language: str, packages: tuple[str, ...], folder: str) -> Domain:
    return Domain(f"man-{language}", packages, f"usr/share/man{folder}/man?/*.gz", render_man)


def _book(language: str, folder: str) -> Domain:
    pattern = f"usr/share/doc/debian-handbook/html/{folder}/*.html"
    return Domain(f"book-{language}", ("debian-handbook",), pattern, read_html, 1.5)


DOMAINS = (
    _man("en", ("manpages", "manpages-dev"), ""),
    _man("de", ("manpages-de", "manpages-de-dev"), "/de"),
    _man("fr", ("manpages-fr", "manpages-fr-dev"), "/fr"),
    _man("es", ("manpages-es", "manpages-es-dev"), "/es"),
    _book("en", "en-US"),
    _book("de", "de-DE"),
    _book("fr", "fr-FR"),
    _book("es", "es-ES"),
    Domain("python-doc", ("python3.11-doc",), "**/_sources/**/*.rst.txt", read_plain),
    Domain("python", (), "**/*.py", read_plain),
    Domain("c-headers", ("libc6-dev", "linux-libc-dev", "libstdc++-12-dev"), "**/*.h", read_plain),
)


def unpack(package: str, work: Path) -> Path:
    """Download `package` with apt and unpack it under `work`; returns the unpacked tree."""
    tree = work / "packages" / package
    if not tree.exists():
        downloads = work / "debs"
        downloads.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["apt-get", "-qq", "download", package], cwd=downloads, check=True, capture_output=True
        )
        (deb,) = downloads.glob(f"{package}_*.deb")
        tree.parent.mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", deb, tree], check=True)
    return tree


def source_files(domain: Domain, work: Path) -> list[Path]:
    """All files of a domain, sorted by path inside their package, so that the order is stable."""
    if domain.packages:
        roots = [unpack(package, work) for package in domain.packages]
    else:
        roots = [Path(sysconfig.get_path("stdlib"))]
    skip = ("site-packages", "dist-packages", "/test/", "/tests/", "idlelib", "__pycache__")
    return [
        path
        for root in roots
        for path in sorted(root.glob(domain.pattern))
        if path.is_file() and not any(part in str(path) for part in skip)
    ]


def documents(domain: Domain, work: Path) -> Iterator[str]:
    """Plain-text documents of a domain in shuffled order, up to its share of megabytes."""
    paths = source_files(domain, work)
    random.Random(domain.name).shuffle(paths)
    size = 0
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(paths), 64):
            for text in pool.map(domain.read, paths[start : start + 64]):
                text = text.strip()[:MAX_DOCUMENT]
                if len(text) > 200:
                    yield text
                    size += len(text.encode())
                if size > domain.megabytes * 1e6:
                    return


def gather(work: Path) -> dict[str, list[str]]:
    """Documents by domain; made once, then read back from `work/corpus.json`."""
    cache = work / "corpus.json"
    if not cache.exists():
        work.mkdir(parents=True, exist_ok=True)
        corpus = {domain.name: list(documents(domain, work)) for domain in DOMAINS}
        partial = cache.with_suffix(".partial")
        partial.write_text(json.dumps(corpus, ensure_ascii=False), encoding="utf-8")
        partial.rename(cache)
    loaded: dict[str, list[str]] = json.loads(cache.read_text(encoding="utf-8"))
    return loaded

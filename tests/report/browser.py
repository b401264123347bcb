"""A headless Chromium for tests: a page's DOM after its scripts ran, and what it asked for.

Each run has a profile of its own. A report has no scripts, so that a page around it measures it;
one local server serves both, as one origin.
"""

import functools
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome")
     if (found := shutil.which(name))), None,
)  # fmt: skip
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0", "--hide-scrollbars",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"
LIGHT = "--blink-settings=preferredColorScheme=1"
_CONSOLE = re.compile(r"^.*:CONSOLE.*$", re.M)
WRAPPER = """<!DOCTYPE html><body style="margin:0">
<iframe id="page" src="{page}" style="border:0;width:{width}px;height:{height}px"></iframe>
<pre id="found"></pre><script>
document.getElementById("page").onload = (event) => {{
  const view = event.target.contentWindow, document_ = event.target.contentDocument;
  const measure = {measure};
  document.getElementById("found").textContent = JSON.stringify(measure(document_, view));
}};
</script></body>"""


@dataclass
class Server:
    """A folder served on this machine; `asked` are the paths that were requested."""

    folder: Path
    port: int = 0
    asked: list[str] = field(default_factory=list)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    served = Server(folder)

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *_: Any) -> None:
            served.asked.append(self.path)

        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        served.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


def dump(url: str, profile: Path, *options: str) -> tuple[str, list[str]]:
    """The DOM of `url` once loaded, and what its console says."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", *options, "--dump-dom", url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return result.stdout, _CONSOLE.findall(result.stderr)


def measure(page: Path, script: str, width: int, *options: str) -> Any:
    """What the function `script` (document, window) → JSON finds in `page`, `width` px wide."""
    wrapper = page.with_name(f"{page.stem}-{width}-wrapper.html")
    wrapper.write_text(WRAPPER.format(page=page.name, width=width, height=800, measure=script))
    with serving(page.parent) as server:
        url = f"http://127.0.0.1:{server.port}/{wrapper.name}"
        window = f"--window-size={width + 100},900"
        dom, console = dump(url, page.with_name(f"profile-{width}"), window, *options)
    assert not console, console
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)
    assert found is not None and found[1], "the page around the report did not run its script"
    return json.loads(unescape(found[1]))

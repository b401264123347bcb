"""Creates a model on an Ollama server, through the official client.

Owns: the server's address, the order of calls (is a server there, upload, create), progress, and
what can go wrong with them. Leaves out: what is created (`modelfile`).

The client uploads a file whether or not the server has it, and says nothing while it does. Both
are mended where httpx, below the client, lets one: in the transport, which asks for the blob first
(`HEAD /api/blobs/{digest}`, as Ollama's own client does) and counts the bytes that go out.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

from moequant.errors import OllamaError, UsageError, plain
from moequant.ollama.modelfile import Modelfile

Progress = Callable[[str, int, int], None]


@contextmanager
def _without_variables(names: Sequence[str]) -> Iterator[None]:
    """The environment without `names` for the time of the block."""
    kept = {name: value for name, value in os.environ.items() if name.upper() in names}
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)


# the import makes a client of these at once, which is never used, and fails if one of them is bad
with _without_variables(("OLLAMA_HOST", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")):
    import ollama

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 11434
PORTS = {"http": 80, "https": 443}  # of an address with a scheme and no port
_HOSTNAME = re.compile(r"[\w-]{1,63}(\.[\w-]{1,63})*\.?")
CONNECT_SECONDS = 5.0
PROBE, PROBE_SECONDS = "/api/tags", 10.0  # what asks whether a server is there; silence in it
# what the client raises for an answer that is no JSON, or JSON of another shape
NO_OLLAMA = (ConnectionError, httpx.HTTPError, ValueError, TypeError, AttributeError)
UPLOAD, CREATE = "uploading", "creating"


def server_address(host: str | None) -> str:
    """`host`, else $OLLAMA_HOST, else 127.0.0.1:11434, as scheme://host:port[/path].

    Raises:
        UsageError: it is no address of a server.
    """
    given = host or os.environ.get("OLLAMA_HOST") or f"{DEFAULT_HOST}:{DEFAULT_PORT}"
    try:
        return _normalised(given)
    except ValueError as error:
        where = "" if host else "$OLLAMA_HOST: "
        raise UsageError(
            f"{where}{given!r} is no address of a server ({error}); it has the form HOST:PORT or "
            "http://HOST:PORT."
        ) from error


def _normalised(given: str) -> str:
    """ValueError for what is no address."""
    if any(c.isspace() or not c.isprintable() for c in given):
        raise ValueError("it has spaces or control characters")
    scheme, separator, rest = given.partition("://")
    if not separator:
        scheme, rest = "http", given
    if scheme not in PORTS:
        raise ValueError(f"{scheme!r} is neither http nor https")
    parts = urlsplit(f"{scheme}://{rest}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("it holds more than host, port and path")
    if not parts.netloc or parts.port == 0:
        raise ValueError("it has no host" if not parts.netloc else "port 0 is no port")
    port = parts.port or (PORTS[scheme] if separator else DEFAULT_PORT)
    path = parts.path.strip("/")
    return f"{scheme}://{_host(parts)}:{port}" + (f"/{path}" if path else "")


def _host(parts: SplitResult) -> str:
    host = parts.hostname or DEFAULT_HOST  # ":11434" is an address to Ollama too
    if parts.netloc.startswith("["):
        return f"[{IPv6Address(host)}]"
    if not _HOSTNAME.fullmatch(host):
        raise ValueError(f"{host!r} is no name of a host")
    return host


def create_model(
    modelfile: Modelfile,
    files: Sequence[Path],
    name: str,
    host: str | None = None,
    progress: Progress = lambda *_: None,
) -> bool:
    """Create `name` from `files` on the server at `host`; False if no server answers there.

    `host` None: $OLLAMA_HOST, else 127.0.0.1:11434. A model of that name is replaced.

    Raises:
        UsageError: `host` is no address.
        OllamaError: a server answers, and refuses, breaks off, or is no Ollama.
    """
    size = sum(path.stat().st_size for path in files)
    transport = _Transport(lambda done: progress(UPLOAD, done, size))
    address = server_address(host)
    with _client(address, transport) as client:
        if not _answers(client, address):
            return False
        try:
            last = _create(client, modelfile, files, name, progress)
        except (ollama.ResponseError, *NO_OLLAMA) as error:
            raise OllamaError(
                f"Ollama at {address} did not create {name}: {_said(error)}"
            ) from error
    if last != "success":
        raise OllamaError(
            f"Ollama at {address} did not create {name}: it fell silent after {last!r:.500}."
        )
    return True


def _client(address: str, transport: "_Transport") -> ollama.Client:
    try:
        return ollama.Client(
            address, transport=transport, timeout=httpx.Timeout(None, connect=CONNECT_SECONDS)
        )
    except (ValueError, httpx.InvalidURL) as error:
        raise UsageError(f"{address} is no address of a server: {error}.") from error


def _answers(client: ollama.Client, address: str) -> bool:
    """Whether a server is there; OllamaError if it is none of Ollama's."""
    try:
        client.list()
    except (ConnectionError, httpx.ConnectTimeout):
        return False
    except httpx.ReadTimeout as error:
        raise OllamaError(
            f"what listens at {address} is no Ollama server: it said nothing for "
            f"{PROBE_SECONDS:g} seconds."
        ) from error
    except (ollama.ResponseError, *NO_OLLAMA) as error:
        raise OllamaError(
            f"what answers at {address} is no Ollama server: {_said(error)}"
        ) from error
    return True


def _create(
    client: ollama.Client, modelfile: Modelfile, files: Sequence[Path], name: str,
    progress: Progress,
) -> str | None:  # fmt: skip
    """Upload and create; the last status the server sent."""
    progress(UPLOAD, 0, sum(path.stat().st_size for path in files))
    blobs = {_blob_name(path): client.create_blob(path) for path in files}
    status = None
    for number, update in enumerate(
        client.create(name, files=blobs, stream=True, **modelfile.request), start=1
    ):
        status = update.status
        progress(CREATE, number, number + (status != "success"))
    return status


def _blob_name(path: Path) -> str:
    """The file's name as Ollama takes it: relative, without ':' and '\\'."""
    return re.sub(r"[:\\]", "_", path.name)


def _said(error: Exception) -> str:
    """The server's or httpx's own words, on one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, ollama.ResponseError):
        code = f" (HTTP {error.status_code})" if error.status_code > 0 else ""
        text = f"{error.error}{code}"
    return plain(" ".join(text.split()))[:500]


class _Transport(httpx.HTTPTransport):
    """HTTP, with blobs uploaded only where the server lacks them, and their bytes reported."""

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self._report = report
        self._sent = 0  # bytes of the blobs so far

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith(PROBE):
            seconds = {**request.extensions["timeout"], "read": PROBE_SECONDS}
            request.extensions = {**request.extensions, "timeout": seconds}
        if request.method != "POST" or "/api/blobs/" not in request.url.path:
            return super().handle_request(request)
        size = int(request.headers["Content-Length"])
        kept = {k: v for k, v in request.headers.items()
                if k not in ("content-length", "content-type", "transfer-encoding")}  # fmt: skip
        question = httpx.Request("HEAD", request.url, headers=kept, extensions=request.extensions)
        answer = super().handle_request(question)
        answer.read()
        answer.close()
        if answer.status_code == httpx.codes.OK:
            self._sent += size
            self._report(self._sent)
            return httpx.Response(httpx.codes.OK, request=request)
        request.stream = _Counted(request.stream, self._count)
        return super().handle_request(request)

    def _count(self, nbytes: int) -> None:
        self._sent += nbytes
        self._report(self._sent)


class _Counted(httpx.SyncByteStream):
    """A request's body that reports the size of each chunk as it goes out."""

    def __init__(self, stream: Any, count: Callable[[int], None]) -> None:
        self._stream = stream
        self._count = count

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            yield chunk
            self._count(len(chunk))

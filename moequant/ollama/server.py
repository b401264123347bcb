"""Creates a model on an Ollama server, through the official client.

Owns: the order of calls (is a server there, upload, create), progress, and what can go wrong with
them. Leaves out: what is created (`modelfile`).

The client uploads a file whether or not the server has it, and says nothing while it does. Both
are mended where httpx, below the client, lets one: in the transport, which asks for the blob first
(`HEAD /api/blobs/{digest}`, as Ollama's own client does) and counts the bytes that go out.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import ollama

from moequant.errors import OllamaError, UsageError
from moequant.ollama.modelfile import Modelfile

Progress = Callable[[str, int, int], None]
CONNECT_SECONDS = 5.0
UPLOAD, CREATE = "uploading", "creating"


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
    try:
        client = ollama.Client(
            host, transport=transport, timeout=httpx.Timeout(None, connect=CONNECT_SECONDS)
        )
    except (ValueError, httpx.InvalidURL) as error:
        raise UsageError(f"{host or '$OLLAMA_HOST'} is no address of a server: {error}.") from error
    with client:
        try:
            client.list()
        except (ConnectionError, httpx.ConnectTimeout, httpx.UnsupportedProtocol):
            return False
        except (ollama.ResponseError, httpx.HTTPError, ValueError) as error:
            raise OllamaError(
                f"what answers at {_address(host)} is no Ollama server: {_said(error)}"
            ) from error
        try:
            last = _create(client, modelfile, files, name, progress)
        except (ollama.ResponseError, ConnectionError, httpx.HTTPError, ValueError) as error:
            raise OllamaError(
                f"Ollama at {_address(host)} did not create {name}: {_said(error)}"
            ) from error
    if last != "success":
        raise OllamaError(
            f"Ollama at {_address(host)} did not create {name}: it fell silent after {last!r}."
        )
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


def _address(host: str | None) -> str:
    return host or os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"


def _said(error: Exception) -> str:
    """The server's or httpx's own words, on one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, ollama.ResponseError):
        code = f" (HTTP {error.status_code})" if error.status_code > 0 else ""
        text = f"{error.error}{code}"
    return " ".join(text.split())[:500]


class _Transport(httpx.HTTPTransport):
    """HTTP, with blobs uploaded only where the server lacks them, and their bytes reported."""

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self._report = report
        self._sent = 0  # bytes of the blobs so far

    def handle_request(self, request: httpx.Request) -> httpx.Response:
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

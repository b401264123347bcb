"""An Ollama server on 127.0.0.1 that checks what it is asked against Ollama's documented API.

Owns: `GET /api/tags`, `HEAD` and `POST /api/blobs/sha256:…`, `POST /api/create` with a streamed
answer. A request that the documentation does not allow is noted in `faults` and refused with 400.
Leaves out: models.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CREATE_FIELDS = {  # docs/api.md, "Create a model"
    "model": str, "from": str, "files": dict, "adapters": dict, "template": str,
    "license": (str, list), "system": str, "parameters": dict, "messages": list, "stream": bool,
    "quantize": str,
}  # fmt: skip
PARAMETERS: dict[str, Any] = {  # docs/modelfile.md, "Valid parameters and values"
    "num_ctx": int, "repeat_last_n": int, "repeat_penalty": float, "temperature": float,
    "seed": int, "stop": list, "num_predict": int, "top_k": int, "top_p": float, "min_p": float,
}  # fmt: skip
STATUSES = ["parsing GGUF", "using existing layer", "writing manifest", "success"]


@dataclass
class Ollama:
    """What the server has, what it was asked, and how it misbehaves.

    `refuse` is the (status, error) that `POST /api/create` answers with; `stream_error` comes
    after the first status; `breaks` is "upload" or "create": the connection ends there.
    """

    blobs: dict[str, bytes] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    refuse: tuple[int, str] | None = None
    stream_error: str | None = None
    breaks: str | None = None
    unfinished: bool = False  # the stream ends before "success"

    def serve(self) -> ThreadingHTTPServer:
        """A server on a free port; the caller runs and closes it."""
        state = self

        class Request(_Request):
            ollama = state

        return ThreadingHTTPServer(("127.0.0.1", 0), Request)

    def check_create(self, request: Any) -> None:
        """Note every field that the documentation does not have, or has otherwise."""
        for name, value in request.items():
            if name not in CREATE_FIELDS or not isinstance(value, CREATE_FIELDS[name]):
                self.faults.append(f"create: {name} = {value!r}")
        for name, value in request.get("parameters", {}).items():
            kind = PARAMETERS.get(name)
            if kind is None or not isinstance(value, (int, float) if kind is float else kind):
                self.faults.append(f"create: parameter {name} = {value!r}")
        for name, digest in request.get("files", {}).items():
            if name.startswith("/") or ".." in name or re.search(r"[:\\]", name):
                self.faults.append(f"create: file name {name!r} is not relative")
            if digest not in self.blobs:
                self.faults.append(f"create: {digest} was not uploaded before")
        if not request.get("files") and not request.get("from"):
            self.faults.append("create: neither files nor from")


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ollama: Ollama

    def do_GET(self) -> None:
        self._note()
        if self.path == "/api/tags":
            self._json(200, {"models": [{"name": name} for name in self.ollama.models]})
        else:
            self._json(404, {"error": "not found"})

    def do_HEAD(self) -> None:
        self._note()
        digest = self._digest()
        self.send_response(200 if digest in self.ollama.blobs else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self._note()
        length = int(self.headers.get("Content-Length") or -1)
        if self.path.startswith("/api/blobs/"):
            if self.ollama.breaks == "upload":
                self.rfile.read(length // 2)
                self.close_connection = True
                return
            self._upload(self.rfile.read(length))
        elif self.path == "/api/create":
            self._create(json.loads(self.rfile.read(length)))
        else:
            self._json(404, {"error": "not found"})

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _note(self) -> None:
        self.ollama.requests.append((self.command, self.path))

    def _digest(self) -> str:
        digest = self.path.removeprefix("/api/blobs/")
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            self.ollama.faults.append(f"digest {digest!r}")
        return digest

    def _upload(self, body: bytes) -> None:
        digest = self._digest()
        if f"sha256:{hashlib.sha256(body).hexdigest()}" != digest:
            self.ollama.faults.append("digest does not match the body")
            self._json(400, {"error": "digest does not match body"})
            return
        self.ollama.blobs[digest] = body
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _create(self, request: dict[str, Any]) -> None:
        self.ollama.check_create(request)
        if self.ollama.refuse:
            self._json(self.ollama.refuse[0], {"error": self.ollama.refuse[1]})
            return
        if self.ollama.faults:
            self._json(400, {"error": self.ollama.faults[-1]})
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._line({"status": STATUSES[0]})
        if self.ollama.breaks == "create":
            self.close_connection = True
            return
        if self.ollama.stream_error:
            self._line({"error": self.ollama.stream_error})
        elif self.ollama.unfinished:
            self._line({"status": STATUSES[1]})
        else:
            for status in STATUSES[1:]:
                self._line({"status": status})
            self.ollama.models[request["model"]] = request
        self.wfile.write(b"0\r\n\r\n")

    def _line(self, data: dict[str, Any]) -> None:
        line = json.dumps(data).encode() + b"\n"
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")

    def _json(self, status: int, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

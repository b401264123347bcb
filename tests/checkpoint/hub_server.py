"""A Hugging Face Hub of a few repositories on 127.0.0.1, for huggingface_hub's real client.

Owns: the documented parts of its API that a download touches: `/api/models/{repo}/revision/{rev}`,
`/api/models/{repo}/tree/{commit}`, and HEAD and GET (with Range) of `/{repo}/resolve/{rev}/{file}`
with the ETag and X-Repo-Commit headers; the X-Error-Code of its refusals; connections that break.
Leaves out: Xet, tokens, everything else.
"""

import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Repos = dict[str, dict[str, bytes]]


@dataclass
class Hub:
    """Repositories, which of them are gated, which files break off, and what was asked for.

    `breaks` counts down per file: that many GETs are cut off in the middle.
    """

    repos: Repos
    gated: set[str] = field(default_factory=set)
    breaks: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range

    def fetched(self, repo: str) -> set[str]:
        """The files of `repo` whose content was asked for."""
        start = f"/{repo}/resolve/"
        paths = [path for method, path, _ in self.requests if method == "GET"]
        return {path[len(start) :].partition("/")[2] for path in paths if path.startswith(start)}

    def serve(self) -> ThreadingHTTPServer:
        """A server on a free port; the caller runs and closes it."""
        hub = self

        class Request(_Request):
            pass

        Request.hub = hub
        return ThreadingHTTPServer(("127.0.0.1", 0), Request)


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 6:
            self._api("/".join(parts[2:4]), parts[4], parts[5])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "EntryNotFound", f"nothing at {path}")

    def _api(self, repo: str, what: str, revision: str) -> None:
        files = self.hub.repos.get(repo)
        if files is None:
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif what == "revision":
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repo, "sha": COMMIT, "siblings": siblings})
        else:
            self._json([_tree_entry(name, content) for name, content in files.items()])

    def _file(self, repo: str, revision: str, name: str) -> None:
        if repo in self.hub.gated:
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
        elif name not in self.hub.repos.get(repo, {}):
            self._refuse(404, "EntryNotFound", f"no {name}")
        else:
            self._content(name, self.hub.repos[repo][name])

    def _content(self, name: str, content: bytes) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.breaks.get(name, 0):
            self.hub.breaks[name] -= 1
            self.wfile.write(content[start : start + (len(content) - start) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, text in headers.items():
            self.send_header(key.replace("_", "-"), text)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._json({"error": message}, status, X_Error_Code=code, X_Error_Message=message)


def _tree_entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": name,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
    if name.endswith((".safetensors", ".bin")):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return entry


def files_in(folder: Path) -> dict[str, bytes]:
    """A folder as a repository."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}

"""A GGUF file to Ollama: the Modelfile beside it, and the model on a server that answers.

Owns: the order of the two, what can be checked before either, and the command that does by hand
what no server did. Leaves out: what a Modelfile says (`describe`), and the calls (`server`).
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moequant.files import check_distinct, check_target, replacing
from moequant.gguf_file import read_model
from moequant.ollama.describe import describe_model, source_line
from moequant.ollama.modelfile import Modelfile
from moequant.ollama.names import check_name
from moequant.ollama.server import Progress, create_model, server_address


@dataclass(frozen=True)
class Published:
    """The Modelfile at `path`; `created` tells whether a server took the model under `name`."""

    name: str
    path: Path
    modelfile: Modelfile
    created: bool
    server: str  # its address
    notes: tuple[str, ...]

    @property
    def by_hand(self) -> str:
        """The command that creates the model."""
        return f"ollama create {self.name} -f {shlex.quote(str(self.path))}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "modelfile": str(self.path), "created": self.created,
            "server": self.server, "by_hand": self.by_hand, "notes": list(self.notes),
        }  # fmt: skip


def modelfile_path(gguf: Path) -> Path:
    """Where the Modelfile of a GGUF file stands: model.gguf → model.Modelfile."""
    return gguf.with_suffix(".Modelfile")


def check_publish(gguf: Path, name: str) -> Path:
    """`modelfile_path(gguf)`, if `publish(gguf, name)` will not fail for what is known without it.

    Raises:
        UsageError: a bad `name` or $OLLAMA_HOST, or a path that a Modelfile cannot hold.
    """
    check_name(name)
    server_address(None)
    path = modelfile_path(gguf)
    _ = Modelfile((source_line(gguf, path.parent),)).text  # raises what `publish` would
    return path


def publish(
    gguf: Path,
    name: str,
    *,
    output: Path | None = None,
    context: int | None = None,
    system: str | None = None,
    host: str | None = None,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> Published:
    """Write the Modelfile of `gguf`, and create the model `name` if a server answers.

    `output` None: `modelfile_path`. The Modelfile stands even if the server refuses.

    Raises:
        UsageError: a bad `name` or `host`, a file Ollama cannot run, a Modelfile that exists.
        GGUFError: a damaged file.
        OllamaError: see `create_model`.
    """
    check_name(name)
    address = server_address(host)
    file = read_model(gguf)
    files = file.shards or (file.path,)
    path = output or modelfile_path(gguf)
    check_distinct([path], files)
    check_target(path, force=force)
    described = describe_model(file, path.parent, context=context, system=system)
    text = described.modelfile.text
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
    created = create_model(described.modelfile, files, name, address, progress)
    return Published(name, path, described.modelfile, created, address, described.notes)

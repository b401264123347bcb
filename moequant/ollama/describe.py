"""From a GGUF file's metadata to the Modelfile that serves it.

Owns: which files Ollama can run, stop tokens, sampling defaults, context. Leaves out: the chat
template's form (`templates`), the Modelfile's grammar (`modelfile`).
"""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from moequant.errors import UsageError
from moequant.expert_banks import is_bank_part
from moequant.gguf_file import GGUFFile
from moequant.ollama.modelfile import Modelfile, Value, writable
from moequant.ollama.templates import ChatTemplate, known_template

DEFAULT_CONTEXT = 8192  # tokens; a model's own length may be 262144, and memory grows with it
SAMPLING: dict[str, tuple[str, type]] = {  # general.sampling.* → Ollama's name, its type
    "temp": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "penalty_last_n": ("repeat_last_n", int),
    "penalty_repeat": ("repeat_penalty", float),
}
STOP_KEYS = ("eos_token_id", "eot_token_id")


@dataclass(frozen=True)
class Description:
    """A Modelfile and what a user should know about it."""

    modelfile: Modelfile
    notes: tuple[str, ...]


def check_servable(file: GGUFFile) -> None:
    """UsageError for a file that Ollama cannot run: no model, or one with expert banks."""
    metadata = file.metadata
    kind = metadata.get("general.type", "model")
    if kind != "model" or not isinstance(metadata.get("general.architecture"), str):
        raise UsageError(f"{file.path} is no language model (general.type is {kind!r:.80}).")
    keyed = any(key.endswith(".expert_bank_version") for key in metadata)
    banks = next((name for name in file.tensors if is_bank_part(name)), None)
    if keyed or banks is not None:
        raise UsageError(
            f"{file.path} has expert banks ({banks or 'expert_bank_version'}): experts of one layer"
            " in several types. The llama.cpp inside Ollama has no code for them, only a patched "
            "one has. Export the checkpoint again with one type per tensor (without per-expert "
            "precision), and give Ollama that file."
        )


def describe_model(
    file: GGUFFile, folder: Path, *, context: int | None = None, system: str | None = None
) -> Description:
    """What a Modelfile in `folder` says of `file`.

    `context`: tokens; None for the model's own length, `DEFAULT_CONTEXT` at most.

    Raises:
        UsageError: see `check_servable`; or more context than the model was made for.
    """
    check_servable(file)
    notes: list[str] = []
    template = _template(file, notes)
    parameters: list[tuple[str, Value]] = [("num_ctx", _context(file, context))]
    parameters += _sampling(file.metadata, notes)
    parameters += [("stop", text) for text in _stops(file.metadata, template, notes)]
    if len(file.shards) > 1:
        notes.append(f"{len(file.shards)} shards: older versions of Ollama take one file only")
    modelfile = Modelfile(
        sources=tuple(source_line(path, folder) for path in file.shards or (file.path,)),
        parameters=tuple(parameters),
        template=template.text if template else None,
        renderer=template.renderer if template else None,
        parser=template.parser if template else None,
        system=system,
        license=_license(file.metadata, notes),
    )
    return Description(modelfile, tuple(notes))


def source_line(path: Path, folder: Path) -> str:
    """What FROM names for `path` in a Modelfile in `folder`.

    `./name` where the file stands beside the Modelfile, so that both can be moved together.
    """
    if path.resolve().parent == folder.resolve() and not path.is_symlink():
        return f"./{path.name}"
    return str(path.resolve())


def _template(file: GGUFFile, notes: list[str]) -> ChatTemplate | None:
    jinja = file.metadata.get("tokenizer.chat_template")
    if not isinstance(jinja, str):
        notes.append("no TEMPLATE: the file has no chat template, as base models have none")
        return None
    template = known_template(jinja)
    if template is None:
        notes.append(
            "no TEMPLATE: the file's chat template has a form moequant does not know; Ollama 0.30 "
            "and later apply the file's own"
        )
    return template


def _context(file: GGUFFile, wanted: int | None) -> int:
    architecture = file.metadata["general.architecture"]
    longest = file.metadata.get(f"{architecture}.context_length")
    if not isinstance(longest, int) or longest < 1:
        return wanted or DEFAULT_CONTEXT
    if wanted is not None and wanted > longest:
        raise UsageError(f"--context {wanted}: {file.path} was made for {longest} tokens at most.")
    return wanted or min(longest, DEFAULT_CONTEXT)


def _sampling(metadata: dict[str, Any], notes: list[str]) -> list[tuple[str, Value]]:
    """The file's sampling defaults; those Ollama has no name for become notes."""
    found: list[tuple[str, Value]] = []
    start = "general.sampling."
    for key, value in metadata.items():
        if not key.startswith(start):
            continue
        name, kind = SAMPLING.get(key.removeprefix(start), (None, str))
        if name is None or not isinstance(value, int | float) or not isfinite(value):
            notes.append(f"{key} = {value!r:.80} has no counterpart in Ollama and is left out")
        else:
            # the shortest decimal that is this float32: 0.6, not 0.6000000238418579
            found.append((name, int(value) if kind is int else float(str(np.float32(value)))))
    return found


def _license(metadata: dict[str, Any], notes: list[str]) -> str | None:
    text = metadata.get("general.license")
    if not isinstance(text, str):
        return None
    if not writable(text):
        notes.append(f"no LICENSE: a Modelfile cannot hold general.license = {text!r:.80}")
        return None
    return text


def _stops(metadata: dict[str, Any], template: ChatTemplate | None, notes: list[str]) -> list[str]:
    """The texts that end an answer: the template's end of a turn, and the end-of-text tokens."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    stops = [] if template is None else [template.stop]
    for key in STOP_KEYS:
        number = metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(tokens, list) and isinstance(number, int) and 0 <= number < len(tokens):
            stops.append(tokens[number])
    texts = [text for text in dict.fromkeys(stops) if isinstance(text, str) and text.strip()]
    notes += [f"no stop {text!r:.80}: a Modelfile cannot hold it"
              for text in texts if not writable(text)]  # fmt: skip
    return [text for text in texts if writable(text)]

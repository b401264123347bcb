"""What a checkpoint, a GGUF file or an imatrix holds, as plain data that prints or becomes JSON.

Owns: the summary and its tables. Leaves out: reading (checkpoint, gguf_file, calibrate) and
printing. No weight is read; a summary costs headers and the maps of expert banks.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, prod
from pathlib import Path
from typing import Any

from moequant.architectures import describe
from moequant.calibrate import Imatrix
from moequant.checkpoint import open_checkpoint
from moequant.checkpoint.hub import looks_like_path
from moequant.errors import GGUFError, UsageError
from moequant.expert_banks import read_banks
from moequant.gguf_file import GGUFFile, is_gguf, read_model
from moequant.parameters import Parameters, count_parameters, is_expert
from moequant.plan import role_of

# Keys whose arrays are long and say nothing to a reader.
HIDDEN_ARRAYS = 16


@dataclass(frozen=True)
class RoleSize:
    """All tensors of one role and type: how many, how many values, how many bytes."""

    role: str
    qtype: str
    tensors: int
    parameters: int
    nbytes: int

    @property
    def bpw(self) -> float:
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Inspection:
    """One file or folder. Lists that do not apply to its kind are empty."""

    path: str
    kind: str  # "checkpoint", "gguf" or "imatrix"
    architecture: str
    parameters: Parameters | None
    dense_bytes: int
    expert_bytes: int
    roles: list[RoleSize]
    routed_share: dict[int, list[float]]  # per layer with experts: share per expert
    thin_experts: list[str]
    left_out: list[str]
    metadata: dict[str, Any] = field(default_factory=dict)
    damage: str = ""  # of a GGUF file's expert banks: what is wrong with them

    @property
    def nbytes(self) -> int:
        return self.dense_bytes + self.expert_bytes

    @property
    def bpw(self) -> float:
        total = self.parameters.total if self.parameters else 0
        return 8 * self.nbytes / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything above as JSON-ready data, with `total` and bits per weight filled in."""
        data = asdict(self)
        if self.parameters is not None:
            data["parameters"]["total"] = self.parameters.total
        data["bytes"], data["bpw"] = self.nbytes, self.bpw
        for row, role in zip(data["roles"], self.roles, strict=True):
            row["bpw"] = role.bpw
        return data


def inspect(source: str) -> Inspection:
    """Summarise a checkpoint folder or Hugging Face id, a GGUF file, or an imatrix file.

    Raises:
        CheckpointError, ArchitectureError, GGUFError, ImatrixError: what `source` names is
            damaged or of a kind that is not served.
        UsageError: a file that is none of these, or a path where nothing is.
    """
    path = Path(source)
    if _is_file(path, source):
        if not is_gguf(path):
            raise UsageError(
                f"{path} is neither a GGUF file nor a checkpoint folder. For a checkpoint, name "
                "the folder that holds config.json."
            )
        file = read_model(path)
        if file.metadata.get("general.type") == "imatrix":
            return _imatrix(path, file)
        return replace(_model_file(path, file), damage=_damage(file))
    return _checkpoint(source)


def _damage(file: GGUFFile) -> str:
    try:
        read_banks(file)
    except GGUFError as error:
        return str(error)
    return ""


def _is_file(path: Path, source: str) -> bool:
    """Whether a file is there; UsageError for what is meant as a path and leads nowhere."""
    try:
        if not path.exists() and looks_like_path(source):
            raise UsageError(f"{source}: no such file or folder.")
        return path.is_file()
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror or error}.") from error


def _checkpoint(source: str) -> Inspection:
    checkpoint = open_checkpoint(source)
    model = describe(checkpoint)
    rows: list[tuple[str, str, int, int]] = []
    for spec in model.tensors:
        if spec.sources:
            infos = [checkpoint.tensors[name] for name in spec.sources]
            dtype = str(infos[0].dtype).removeprefix("torch.")
            nbytes = sum(info.stop - info.start for info in infos)
            rows.append((spec.name, dtype, prod(spec.shape), nbytes))
    counts = model.expert_count, model.expert_used_count
    return _summary(checkpoint.name, "checkpoint", model.architecture, rows, counts,
                    left_out=list(model.left_out),
                    metadata={"source.digest": checkpoint.digest(),
                              "block_count": model.block_count,
                              "expert_count": model.expert_count,
                              "expert_used_count": model.expert_used_count,
                              "moe_layers": list(model.moe_layers)})  # fmt: skip


def _model_file(path: Path, file: GGUFFile) -> Inspection:
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        architecture = "unknown"
    # a bank's map has bytes, but no parameters
    rows = [(t.name, t.qtype, prod(t.shape) if t.qtype != "I32" else 0, t.nbytes)
            for t in file.tensors.values()]  # fmt: skip
    counts = (
        _count(file, f"{architecture}.expert_count"),
        _count(file, f"{architecture}.expert_used_count"),
    )
    return _summary(str(path), "gguf", architecture, rows, counts,
                    routed_share=_stored_share(file.metadata, counts[0]),
                    thin_experts=_stored_thin(file.metadata),
                    metadata=_readable(file.metadata))  # fmt: skip


def _count(file: GGUFFile, key: str) -> int:
    """A count in the metadata, 0 if it is not there; the largest where each layer has its own."""
    value = file.metadata.get(key, 0)
    counts = value if isinstance(value, list) else [value]
    if any(type(count) is not int or count < 0 for count in counts):
        raise GGUFError(f"{file.path}: {key} is {value!r:.80}, not a count.")
    return max(counts, default=0)


def _imatrix(path: Path, file: GGUFFile) -> Inspection:
    for key in ("moequant.calibration.floor", "moequant.calibration.kappa"):
        value = file.metadata.get(key, 0)
        if type(value) not in (int, float) or not isfinite(value):
            raise GGUFError(f"{file.path}: {key} is {value!r:.80}, not a number.")
    imatrix = Imatrix.read(path)
    rows = [
        RoleSize(role, "F32", len(group), sum(s.in_sum2.size for s in group), 0)
        for role, group in _by_role(imatrix.entries.items())
    ]
    thin = [str(expert) for expert in imatrix.thin_experts()]
    return Inspection(
        path=str(path),
        kind="imatrix",
        architecture="",
        parameters=None,
        dense_bytes=0,
        expert_bytes=0,
        roles=rows,
        routed_share=imatrix.routed_share(),
        thin_experts=thin,
        left_out=[],
        metadata=_readable(file.metadata),
    )


def _by_role(items: Iterable[tuple[str, Any]]) -> list[tuple[str, list[Any]]]:
    groups: dict[str, list[Any]] = defaultdict(list)
    for name, value in items:
        groups[role_of(name)].append(value)
    return list(groups.items())


def _summary(
    path: str,
    kind: str,
    architecture: str,
    rows: list[tuple[str, str, int, int]],
    counts: tuple[int, int],
    *,
    routed_share: dict[int, list[float]] | None = None,
    thin_experts: list[str] | None = None,
    left_out: list[str] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Inspection:
    """An Inspection from (name, type, values, bytes) rows and (experts, experts per token)."""
    groups: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for name, qtype, size, nbytes in rows:
        groups[role_of(name), qtype].append((size, nbytes))
    roles = [
        RoleSize(role, qtype, len(group), sum(g[0] for g in group), sum(g[1] for g in group))
        for (role, qtype), group in groups.items()
    ]
    expert_bytes = sum(row[3] for row in rows if is_expert(row[0]))
    return Inspection(
        path=path,
        kind=kind,
        architecture=architecture,
        parameters=count_parameters([(row[0], row[2]) for row in rows], *counts),
        dense_bytes=sum(row[3] for row in rows) - expert_bytes,
        expert_bytes=expert_bytes,
        roles=sorted(roles, key=lambda role: -role.nbytes),
        routed_share=routed_share or {},
        thin_experts=thin_experts or [],
        left_out=left_out or [],
        metadata=metadata or {},
    )


def _stored_thin(metadata: dict[str, Any]) -> list[str]:
    """The lines that `moequant.experts.thin` keeps; nothing if they are no text."""
    thin = metadata.get("moequant.experts.thin")
    if not isinstance(thin, list) or not all(isinstance(line, str) for line in thin):
        return []
    return thin


def _stored_share(metadata: dict[str, Any], expert_count: int) -> dict[int, list[float]]:
    """The routed share that `moequant.experts.*` keeps; nothing if it is not layers and shares."""
    layers = metadata.get("moequant.experts.layers")
    flat = metadata.get("moequant.experts.routed_share")
    if not expert_count or not isinstance(layers, list) or not isinstance(flat, list):
        return {}
    if len(flat) != expert_count * len(layers) or any(type(bid) is not int for bid in layers):
        return {}
    if any(type(share) is not float or not 0 <= share <= 1 for share in flat):
        return {}
    return {bid: flat[i * expert_count : (i + 1) * expert_count] for i, bid in enumerate(layers)}


def _readable(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata with long arrays and templates replaced by their length, as JSON can hold it."""
    shown: dict[str, Any] = {}
    for key, value in metadata.items():
        if isinstance(value, list) and len(value) > HIDDEN_ARRAYS:
            shown[key] = f"[{len(value)} values]"
        elif isinstance(value, list):
            shown[key] = [_finite(item) for item in value]
        elif key == "tokenizer.chat_template" and isinstance(value, str):
            shown[key] = f"({len(value)} characters)"
        else:
            shown[key] = _finite(value)
    return shown


def _finite(value: Any) -> Any:
    """The value, or its name where JSON has no number for it: "nan", "inf", "-inf"."""
    return str(value) if isinstance(value, float) and not isfinite(value) else value

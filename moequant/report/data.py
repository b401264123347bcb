"""What a report is made from: one GGUF file, and what was measured of it.

Owns: finding and reading these. Leaves out: whether they belong together (`same_model`), wording
(`sections`), drawing (`plots`) and measuring.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moequant.errors import UsageError
from moequant.gguf_file import is_gguf, read_model
from moequant.inspection import Inspection, inspect
from moequant.report.evaluation import Evaluation, Measured, read_evaluation
from moequant.report.model_file import Grid, bits_by_expert, bits_by_tensor
from moequant.report.routing import Routing, read_routing
from moequant.report.same_model import check_evaluation, check_routing


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    `perplexity`: of the checkpoint and of the file, where an export measured it. `notes`: what a
    reader should know about how the inputs fit together.
    """

    path: Path
    inspection: Inspection
    metadata: dict[str, Any]
    bits: Grid | None
    expert_bits: dict[str, Grid]
    evaluation: Evaluation | None = None
    routing: Routing | None = None
    perplexity: tuple[Measured, Measured] | None = None
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) and name.strip() else self.path.stem

    def texts(self, key: str) -> list[str]:
        """The lines under a metadata key; none if it is not there or holds something else."""
        lines = self.metadata.get(key)
        return [line for line in lines if isinstance(line, str)] if isinstance(lines, list) else []


def gather(
    source: Path,
    evaluation: Path | None = None,
    routing: Path | None = None,
    perplexity: tuple[Measured, Measured] | None = None,
) -> ReportData:
    """Read `source` (a GGUF file, or an evaluation's JSON, which names its file) and the rest.

    Raises:
        GGUFError: the file is damaged.
        UsageError: a JSON file is damaged, or was measured on another file or model.
    """
    file, evaluation = find_file(source, evaluation)
    header = read_model(file)
    if header.metadata.get("general.type") == "imatrix":
        raise UsageError(f"{file} is an imatrix; a report is made from a model's GGUF file.")
    measured = None if evaluation is None else read_evaluation(evaluation)
    routed = None if routing is None else read_routing(routing)
    inspection = inspect(str(file))
    notes: tuple[str, ...] = ()
    if evaluation is not None and measured is not None:
        check_evaluation(evaluation, measured, header, inspection)
        notes = _evaluation_notes(measured, file)
    if routing is not None and routed is not None:
        check_routing(routing, routed, header)
    return ReportData(
        file, inspection, header.metadata, bits_by_tensor(header), bits_by_expert(header),
        measured, routed, perplexity, notes,
    )  # fmt: skip


def find_file(source: Path, evaluation: Path | None = None) -> tuple[Path, Path | None]:
    """The GGUF file and the evaluation that `source` and `evaluation` name between them.

    Raises:
        UsageError: `source` is neither, or an evaluation whose file is not there.
    """
    if not source.exists():
        raise UsageError(f"{source}: no such file.")
    if is_gguf(source):
        return source, evaluation
    if source.is_dir() or source.suffix.lower() == ".gguf":
        raise UsageError(f"{source} is no GGUF file; a report is made from one.")
    if evaluation is not None:
        raise UsageError(f"{source} is no GGUF file; beside --evaluation, name the model's file.")
    named = Path(read_evaluation(source).file)
    for file in (named, source.parent / named, source.parent / named.name):
        if is_gguf(file):
            return file, source
    raise UsageError(
        f"{source} is about {named}, which is not there; "
        f"give the file too: moequant report FILE.gguf --evaluation {source}"
    )


def _evaluation_notes(evaluation: Evaluation, file: Path) -> tuple[str, ...]:
    """The evaluation's own notes, and one if it names a file of another name."""
    notes = tuple(evaluation.notes)
    name = Path(evaluation.file).name
    if name != file.name:
        notes += (f"The evaluation names the file {name}; this report is about {file.name}.",)
    return notes

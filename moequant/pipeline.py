"""The stages in order: checkpoint → imatrix → plan → GGUF file.

Owns: which stage runs when, and what each hands to the next. Leaves out: all the work, which is
the stages' own, and all printing, which is the CLI's.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from moequant.architectures import ModelSpec, describe
from moequant.calibrate import CalibrationOptions, Imatrix, calibrate
from moequant.calibrate.weights import WeightSource
from moequant.checkpoint import Checkpoint
from moequant.errors import ImatrixError, PlanError, UsageError, listing
from moequant.evaluate.gguf_weights import GGUFWeights
from moequant.evaluate.perplexity import Perplexity, perplexity
from moequant.expert_errors import expert_scores
from moequant.files import check_distinct, check_target
from moequant.gguf_export.banks import bank_metadata
from moequant.gguf_export.metadata import gguf_metadata
from moequant.gguf_export.model_file import UNWEIGHTED, write_model
from moequant.gguf_export.provenance import provenance
from moequant.gguf_file import read_gguf
from moequant.parameters import Parameters, count_parameters
from moequant.plan import PRESETS, Plan, per_expert_plan, preset_plan, rankable

Progress = Callable[[str, int, int], None]
OUTPUT = "output.weight"  # llama-imatrix names it so in tied models too


@dataclass(frozen=True)
class ExportOptions:
    """What `moequant export` can be told.

    `plan_file` replaces `preset`; `imatrix_file` replaces calibration; `calibration` None means
    that there is none. `per_expert`: experts of one layer may get different types, at the preset's
    size; such a file needs a patched llama.cpp.
    """

    preset: str = "Q4_K_M"
    per_expert: bool = False
    plan_file: Path | None = None
    imatrix_file: Path | None = None
    calibration: CalibrationOptions | None = field(default_factory=CalibrationOptions)
    save_imatrix: Path | None = None
    save_plan: Path | None = None
    device: str = "cpu"
    force: bool = False


@dataclass(frozen=True)
class ExportResult:
    """What an export made: the file, its plan, and the imatrix behind it."""

    path: Path
    checkpoint: Checkpoint
    model: ModelSpec
    plan: Plan
    imatrix: Imatrix | None
    parameters: Parameters
    source_bytes: int  # of the tensors that were exported, as the checkpoint stores them
    unweighted: tuple[str, ...]  # tensors that had no entry in the imatrix
    edited: tuple[str, ...]  # tensors whose type is not the preset's
    notes: tuple[str, ...]  # what a user should know and no table says

    @property
    def file_bytes(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class Fidelity:
    """Perplexity on one text: of the checkpoint, and of the file made from it."""

    before: Perplexity
    after: Perplexity


def export(
    checkpoint: Checkpoint, path: Path, options: ExportOptions, progress: Progress = lambda *_: None
) -> ExportResult:
    """Turn a checkpoint into the GGUF file `path`; a file for every arrow if asked to save them.

    Raises:
        MoequantError: anything its stages raise; nothing then stands under `path`.
    """
    check_device(options.device)
    check_places(checkpoint.path, path, options)
    model = describe(checkpoint)
    plan = make_plan(checkpoint, model, options)
    if options.per_expert:
        check_per_expert(plan, options)
    check_target(path, force=options.force, needed=plan.size_bytes)
    # before calibration, which may take hours: a tokenizer that is not served fails here
    metadata = gguf_metadata(model, checkpoint, file_type=PRESETS[plan.preset].file_type)
    imatrix = obtain_imatrix(checkpoint, model, plan, options, progress)
    if options.save_imatrix is not None and imatrix is not None:
        imatrix.write(options.save_imatrix)
    if options.per_expert and imatrix is not None:
        scores = expert_scores(checkpoint, model, rankable(plan), imatrix, options.device, progress)
        plan = per_expert_plan(plan, scores)
    if options.save_plan is not None:
        plan.write(options.save_plan)
    used = imatrix if plan_uses_importance(plan) else None
    result = ExportResult(
        path, checkpoint, model, plan, used,
        parameters=model_parameters(model),
        source_bytes=_source_bytes(checkpoint, model),
        unweighted=_unweighted(plan, used),
        edited=_edited(plan, model),
        notes=_notes(checkpoint, used),
    )  # fmt: skip
    source = None if options.imatrix_file is None else options.imatrix_file.name
    metadata += bank_metadata(plan)
    metadata += provenance(checkpoint, plan, used, result.parameters, source=source,
                           unweighted=result.unweighted, edited=result.edited)  # fmt: skip
    write_model(path, checkpoint, model, plan, used, metadata, options.device, progress)
    return result


def write_lossless(
    checkpoint: Checkpoint, path: Path, progress: Progress = lambda *_: None
) -> None:
    """The checkpoint as a GGUF file with every weight as it is: in its own type if it has one."""
    matrices = [spec for spec in describe(checkpoint).tensors if len(spec.shape) > 1]
    dtypes = {checkpoint.tensors[name].dtype for spec in matrices for name in spec.sources}
    own = {torch.bfloat16: "BF16", torch.float16: "F16"}
    preset = own.get(dtypes.pop(), "F32") if len(dtypes) == 1 else "F32"
    export(checkpoint, path, ExportOptions(preset=preset, calibration=None), progress)


def check_device(device: str) -> None:
    """UsageError unless `device` is cpu, or a cuda device that this machine has."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise UsageError(f"--device {device}: no such kind of device; use cpu, cuda or cuda:N.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {device}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; use "
            "--device cpu, or a PyTorch that is built for your GPU."
        )


def make_plan(checkpoint: Checkpoint, model: ModelSpec, options: ExportOptions) -> Plan:
    """The plan of `options`: read and checked against the model, or made from its preset."""
    if options.plan_file is not None:
        plan = Plan.read(options.plan_file)
        try:
            plan.check(model)
        except PlanError as error:
            raise PlanError(f"{error}{_remedy(checkpoint, 'plan')}") from error
        return plan
    has_imatrix = options.imatrix_file is not None or options.calibration is not None
    base = base_type(checkpoint, model)
    return preset_plan(options.preset, model, has_imatrix=has_imatrix, base=base)


def check_per_expert(plan: Plan, options: ExportOptions) -> None:
    """What stands against types for single experts, before calibration.

    Raises:
        UsageError: no importance to rank experts by, or a plan that has types already.
        PlanError: no tensor of `plan` has experts that could differ.
    """
    if options.plan_file is not None:
        raise UsageError(
            "--expert-precision per-expert has no use beside --plan, which has all types."
        )
    if options.calibration is None and options.imatrix_file is None:
        raise UsageError(
            "--expert-precision per-expert ranks experts by what calibration measures; leave out "
            "--no-calibration, or give an --imatrix made by `moequant calibrate`."
        )
    rankable(plan)


def base_type(checkpoint: Checkpoint, model: ModelSpec) -> str:
    """The float type of what is not quantized: the converter's `--outtype auto`."""
    for spec in model.tensors:
        for source in spec.sources[:1]:
            dtype = checkpoint.tensors[source].dtype
            if len(spec.shape) > 1 and dtype in (torch.bfloat16, torch.float16):
                return "BF16" if dtype == torch.bfloat16 else "F16"
    return "F16"


def obtain_imatrix(
    checkpoint: Checkpoint,
    model: ModelSpec,
    plan: Plan,
    options: ExportOptions,
    progress: Progress = lambda *_: None,
) -> Imatrix | None:
    """Read or measure importance; None where it is switched off or nobody wants it.

    Raises:
        ImatrixError: the file is damaged or of another model.
    """
    if options.imatrix_file is not None:
        imatrix = Imatrix.read(options.imatrix_file)
        try:
            _check_imatrix(options.imatrix_file, imatrix, model)
        except ImatrixError as error:
            raise ImatrixError(f"{error}{_remedy(checkpoint, 'calibrate')}") from error
        return imatrix
    wanted = plan_uses_importance(plan) or options.save_imatrix is not None
    if options.calibration is None or not wanted:
        return None
    return calibrate(checkpoint, model, options.calibration, progress)


def plan_uses_importance(plan: Plan) -> bool:
    """True if any tensor's type is one whose encoder can use importance."""
    return any(not UNWEIGHTED.issuperset(tensor.qtypes) for tensor in plan.tensors)


def model_parameters(model: ModelSpec) -> Parameters:
    """Parameters that the file will hold."""
    sizes = [(spec.name, prod(spec.shape)) for spec in model.tensors]
    return count_parameters(sizes, model.expert_count, model.expert_used_count)


def measure_perplexity(
    result: ExportResult, windows: torch.Tensor, device: str, progress: Progress = lambda *_: None
) -> Fidelity:
    """Perplexity of the checkpoint and of the file on `windows`, by the same streamed forward.

    `windows`: token ids (n, length), from `evaluate.perplexity.text_windows`. Both run in float32,
    so that nothing but the weights differs.
    """
    weights = GGUFWeights(read_gguf(result.path), result.model)
    sources: dict[str, WeightSource] = {"before": result.checkpoint, "after": weights}
    measured = {
        stage: perplexity(
            source,
            result.model,
            windows,
            device=device,
            dtype=torch.float32,
            progress=_named(stage, progress),
        )
        for stage, source in sources.items()
    }
    return Fidelity(measured["before"], measured["after"])


def _named(stage: str, progress: Progress) -> Progress:
    """`progress` with the stage's own name in place of what the forward calls its parts."""
    return lambda _, done, total: progress(f"perplexity {stage}", done, total)


def _check_imatrix(path: Path, imatrix: Imatrix, model: ModelSpec) -> None:
    """ImatrixError if the statistics are not this model's: other shapes, or tensors it lacks."""
    matrices = {t.name: (t.n_matrices, t.shape[-1]) for t in model.tensors if len(t.shape) > 1}
    unknown = [name for name in imatrix.entries if name not in matrices and name != OUTPUT]
    if unknown:
        raise ImatrixError(
            f"{path} belongs to another model; it has {len(unknown)} tensors that this one has "
            f"not:{listing(unknown)}"
        )
    imatrix.check((name, *sizes) for name, sizes in matrices.items())


def _remedy(checkpoint: Checkpoint, command: str) -> str:
    """How `command` makes a file that fits, where a part of a checkpoint is exported."""
    if not checkpoint.part:
        return ""
    option = checkpoint.part.replace(" ", "-")
    made = f"make the file with `moequant {command} --{option}`"
    return f"\nThis export is {checkpoint.part}: {made}."


def _unweighted(plan: Plan, imatrix: Imatrix | None) -> tuple[str, ...]:
    """Tensors that will be quantized without importance although there is an imatrix."""
    if imatrix is None:
        return ()
    return imatrix.check(
        (tensor.name, prod(tensor.shape[:-2]), tensor.shape[-1])
        for tensor in plan.tensors
        if len(tensor.shape) > 1 and not UNWEIGHTED.issuperset(tensor.qtypes)
    )


def _edited(plan: Plan, model: ModelSpec) -> tuple[str, ...]:
    """Tensors whose type is not the one the plan's preset gives them."""
    preset = preset_plan(plan.preset, model, has_imatrix=plan.has_imatrix, base=plan.base)
    return plan.edited(preset)


def _notes(checkpoint: Checkpoint, imatrix: Imatrix | None) -> tuple[str, ...]:
    """A warning where the imatrix was measured on a checkpoint that differs from this one."""
    if imatrix is None:
        return ()
    digest = imatrix.metadata.get("moequant.checkpoint.digest")
    if digest in (None, checkpoint.digest()):
        return ()
    keys = ("moequant.checkpoint.name", "moequant.checkpoint.part")
    name = ", ".join(str(imatrix.metadata[key]) for key in keys if key in imatrix.metadata)
    return (f"the imatrix was measured on another checkpoint ({name}); shapes fit, so it is used",)


def _source_bytes(checkpoint: Checkpoint, model: ModelSpec) -> int:
    infos = (checkpoint.tensors[name] for spec in model.tensors for name in spec.sources)
    return sum(info.stop - info.start for info in infos)


def check_places(
    source: Path,
    path: Path,
    options: ExportOptions,
    *,
    written: Iterable[Path] = (),
    read: Iterable[Path] = (),
) -> None:
    """Every place that an export of `source` to `path` writes to, before any work is done.

    `written` and `read` are what the caller writes and reads besides, after the export.

    Raises:
        UsageError: two of the files are one, one is also read, or one cannot be written.
    """
    if options.save_imatrix is not None and options.calibration is None:
        raise UsageError("--save-imatrix and --no-calibration exclude each other.")
    if options.save_imatrix is not None and options.imatrix_file is not None:
        raise UsageError("--save-imatrix has no use beside --imatrix.")
    saved = [extra for extra in (options.save_imatrix, options.save_plan) if extra is not None]
    extras = [*saved, *written]
    texts = () if options.calibration is None else options.calibration.texts
    files = [file for file in (options.imatrix_file, options.plan_file) if file is not None]
    check_distinct([path, *extras], [source, *files, *texts, *read])
    for place in (path, *extras):
        check_target(place, force=options.force)

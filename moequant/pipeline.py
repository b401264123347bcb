"""The stages in order: checkpoint → imatrix → plan → GGUF file.

Owns: which stage runs when, and what each hands to the next. Leaves out: all the work, which is
the stages' own, and all printing, which is the CLI's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from moequant.architectures import ModelSpec, describe
from moequant.calibrate import CalibrationOptions, Imatrix, calibrate
from moequant.calibrate.weights import WeightSource
from moequant.checkpoint import Checkpoint
from moequant.errors import UsageError
from moequant.evaluate.gguf_weights import GGUFWeights
from moequant.evaluate.perplexity import Perplexity, perplexity
from moequant.gguf_export.metadata import gguf_metadata
from moequant.gguf_export.model_file import UNWEIGHTED, write_model
from moequant.gguf_export.provenance import provenance
from moequant.gguf_export.writer import check_target
from moequant.gguf_file import read_gguf
from moequant.parameters import Parameters, count_parameters
from moequant.plan import PRESETS, Plan, preset_plan

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExportOptions:
    """What `moequant export` can be told.

    `plan_file` replaces `preset`; `imatrix_file` replaces calibration; `calibration` None means
    that there is none.
    """

    preset: str = "Q4_K_M"
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
    file_bytes: int
    source_bytes: int  # of the tensors that were exported, as the checkpoint stores them
    unweighted: tuple[str, ...]  # tensors that had no entry in the imatrix


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
    model = describe(checkpoint)
    plan = make_plan(checkpoint, model, options)
    _check_targets(path, plan, options)
    imatrix = obtain_imatrix(checkpoint, model, plan, options, progress)
    unweighted = _unweighted(plan, imatrix)
    if options.save_imatrix is not None and imatrix is not None:
        imatrix.write(options.save_imatrix)
    if options.save_plan is not None:
        plan.write(options.save_plan)
    parameters = model_parameters(model)
    metadata = [
        *gguf_metadata(model, checkpoint, file_type=PRESETS[plan.preset].file_type),
        *provenance(checkpoint, plan, imatrix, parameters),
    ]
    write_model(path, checkpoint, model, plan, imatrix, metadata, options.device, progress)
    return ExportResult(
        path, checkpoint, model, plan, imatrix, parameters,
        file_bytes=path.stat().st_size,
        source_bytes=_source_bytes(checkpoint, model),
        unweighted=unweighted,
    )  # fmt: skip


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
        plan.check(model)
        return plan
    has_imatrix = options.imatrix_file is not None or options.calibration is not None
    return preset_plan(options.preset, model, has_imatrix=has_imatrix, base=base_type(checkpoint))


def base_type(checkpoint: Checkpoint) -> str:
    """The float type of what is not quantized: the converter's `--outtype auto`."""
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    return "BF16" if torch.bfloat16 in dtypes else "F16"


def obtain_imatrix(
    checkpoint: Checkpoint,
    model: ModelSpec,
    plan: Plan,
    options: ExportOptions,
    progress: Progress = lambda *_: None,
) -> Imatrix | None:
    """Read or measure importance; None where it is switched off or no type of the plan uses it."""
    if options.imatrix_file is not None:
        return Imatrix.read(options.imatrix_file)
    if options.calibration is None or not plan_uses_importance(plan):
        return None
    return calibrate(checkpoint, model, options.calibration, progress)


def plan_uses_importance(plan: Plan) -> bool:
    """True if any tensor's type is one whose encoder can use importance."""
    return any(tensor.qtype not in UNWEIGHTED for tensor in plan.tensors)


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


def _unweighted(plan: Plan, imatrix: Imatrix | None) -> tuple[str, ...]:
    """Tensors that will be quantized without importance although there is an imatrix.

    Raises:
        ImatrixError: the imatrix is of another model.
    """
    if imatrix is None:
        return ()
    return imatrix.check(
        (tensor.name, prod(tensor.shape[:-2]), tensor.shape[-1])
        for tensor in plan.tensors
        if len(tensor.shape) > 1 and tensor.qtype not in UNWEIGHTED
    )


def _source_bytes(checkpoint: Checkpoint, model: ModelSpec) -> int:
    infos = (checkpoint.tensors[name] for spec in model.tensors for name in spec.sources)
    return sum(info.stop - info.start for info in infos)


def _check_targets(path: Path, plan: Plan, options: ExportOptions) -> None:
    """Every place that will be written to, before any work is done."""
    if options.save_imatrix is not None and options.calibration is None:
        raise UsageError("--save-imatrix and --no-calibration exclude each other.")
    check_target(path, force=options.force, needed=plan.size_bytes)
    for extra in (options.save_imatrix, options.save_plan):
        if extra is not None:
            check_target(extra, force=options.force)

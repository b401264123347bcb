"""`moequant export`, `calibrate`, `plan` and `presets`.

Owns: their options and which tables they print. Leaves out: all work.
"""

from pathlib import Path
from typing import Any

import click

from moequant.commands.shared import (
    calibration_options,
    chosen_calibration,
    force_option,
    json_option,
    open_checkpoint,
    out,
    output_option,
    print_json,
    progress_bars,
    quant_option,
    without_experts_option,
)

CALIBRATION_ONLY = (
    "texts", "calibration_tokens", "sequence_length", "expert_floor", "seed", "compute_dtype",
)  # fmt: skip


@click.command()
@click.argument("checkpoint")
@output_option
@quant_option
@without_experts_option
@click.option("--expert-precision", type=click.Choice(["per-layer", "per-expert"]),
              default="per-layer", show_default=True,
              help="per-expert: within a layer, experts whose error weighs most get more bits, "
              "others fewer, at the preset's size. Such a file needs llama.cpp with moequant's "
              "patch; stock llama.cpp and Ollama refuse it.")  # fmt: skip
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), metavar="PLAN.JSON",
              help="Use this plan's types instead of a preset's.")  # fmt: skip
@click.option("--imatrix", "imatrix_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Take importance from this imatrix (ours or llama-imatrix's).")  # fmt: skip
@click.option("--no-calibration", is_flag=True, help="Quantize without importance.")
@calibration_options
@click.option("--save-imatrix", type=click.Path(path_type=Path), metavar="FILE",
              help="Keep the imatrix, for further exports.")  # fmt: skip
@click.option("--save-plan", type=click.Path(path_type=Path), metavar="FILE",
              help="Keep the plan.")  # fmt: skip
@click.option("--perplexity", "text", type=click.Path(path_type=Path), metavar="TEXT",
              help="Then measure perplexity on TEXT, before and after.")  # fmt: skip
@click.option("--report", "with_report", is_flag=True,
              help="Then write a page about the file beside it: model.html.")  # fmt: skip
@click.option("--ollama", "ollama_name", metavar="NAME",
              help="Then write a Modelfile; create NAME if an Ollama answers.")  # fmt: skip
@force_option
@json_option
@click.pass_context
def export(
    ctx: click.Context,
    /,
    checkpoint: str,
    output: Path,
    text: Path | None,
    without_experts: bool,
    with_report: bool,
    ollama_name: str | None,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Calibrate, quantize and write a GGUF file in one go."""
    from moequant import pipeline
    from moequant.architectures import describe
    from moequant.evaluate.perplexity import text_windows
    from moequant.files import check_target
    from moequant.ollama import check_publish
    from moequant.tables import export as tables

    _refuse_idle_options(ctx)
    options = _export_options(arguments)
    check_target(output, force=options.force)
    if ollama_name is not None:
        _refuse_banks(options)
    page = output.with_suffix(".html") if with_report else None
    written = [page] if page is not None else []
    if ollama_name is not None:
        written.append(check_publish(output, ollama_name))
    read = [text] if text is not None else []
    pipeline.check_places(Path(checkpoint), output, options, written=written, read=read)
    opened = open_checkpoint(checkpoint, dense_part=without_experts)
    windows = None if text is None else text_windows(opened.path, text, spec=describe(opened))
    with progress_bars(quiet=as_json) as progress:
        result = pipeline.export(opened, output, options, progress)
        fidelity = None
        if windows is not None:
            fidelity = pipeline.measure_perplexity(result, windows, options.device, progress)
    if page is not None:
        _write_report(page, result.path, fidelity)
    if as_json:
        data = tables.export_json(result, fidelity)
        if page is not None:
            data["report"] = str(page)
        if ollama_name is not None:
            _print_with_ollama(data, ollama_name, result.path)
            return
        print_json(data)
        return
    for table in tables.export_tables(result, fidelity):
        out.print(table)
    if page is not None:
        out.print(f"report: {page}", soft_wrap=True)
    if ollama_name is not None:
        from moequant.tables.ollama import ollama_tables

        for table in ollama_tables(_publish(ollama_name, result.path)):
            out.print(table, soft_wrap=True)


def _refuse_banks(options: Any) -> None:
    """UsageError where the file would have expert banks, which Ollama cannot run."""
    from moequant.errors import UsageError
    from moequant.plan import Plan

    cause = "--expert-precision per-expert" if options.per_expert else ""
    if options.plan_file is not None and Plan.read(options.plan_file).banked:
        cause = f"{options.plan_file}, which gives experts of one layer different types,"
    if cause:
        raise UsageError(
            f"--ollama and {cause} exclude each other: the llama.cpp inside Ollama cannot run "
            "expert banks, only a patched one can. Export with one type per tensor for Ollama."
        )


def _write_report(page: Path, path: Path, fidelity: Any) -> None:
    from moequant.report import Measured, gather, write_report

    perplexity = None
    if fidelity is not None:
        before, after = (Measured(p.ppl, p.stderr) for p in (fidelity.before, fidelity.after))
        perplexity = (before, after)
    write_report(page, gather(path, perplexity=perplexity))


def _print_with_ollama(data: dict[str, Any], name: str, path: Path) -> None:
    """JSON of an export and of what Ollama said, also where that is an error (exit code 1)."""
    from moequant.errors import MoequantError, OllamaError

    try:
        data["ollama"] = _publish(name, path, quiet=True).to_json()
    except MoequantError as error:
        print_json({**data, "ollama": {"error": str(error)}})
        raise OllamaError(str(error)) from error
    print_json(data)


def _publish(name: str, path: Path, *, quiet: bool = False) -> Any:
    from moequant.ollama import publish

    with progress_bars(quiet=quiet) as progress:  # the Modelfile was checked before the export
        return publish(path, name, force=True, progress=progress)


def _refuse_idle_options(ctx: click.Context) -> None:
    """UsageError for options that were given and would have no effect."""
    from moequant.errors import UsageError

    def given(name: str) -> bool:
        return ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE

    if given("plan_file") and given("preset"):
        raise UsageError("--quant has no use beside --plan, which has a type for every tensor.")
    without = [name for name in ("imatrix_file", "no_calibration") if given(name)]
    options = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    idle = [options[name] for name in CALIBRATION_ONLY if given(name)]
    if without and idle:
        raise UsageError(f"{', '.join(idle)}: no use beside {options[without[0]]}.")


def _export_options(arguments: dict[str, Any]) -> Any:
    from moequant.errors import UsageError
    from moequant.pipeline import ExportOptions

    calibration = chosen_calibration(arguments)
    no_calibration = arguments.pop("no_calibration")
    if no_calibration and arguments["imatrix_file"] is not None:
        raise UsageError("--no-calibration and --imatrix exclude each other.")
    per_expert = arguments.pop("expert_precision") == "per-expert"
    measured = None if no_calibration else calibration
    return ExportOptions(calibration=measured, per_expert=per_expert, **arguments)


@click.command(short_help="Measure importance and write it as an imatrix.")
@click.argument("checkpoint")
@output_option
@without_experts_option
@calibration_options
@force_option
@json_option
def calibrate(
    checkpoint: str,
    output: Path,
    without_experts: bool,
    force: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Measure importance per column and expert; write it as an imatrix that llama.cpp reads too."""
    from moequant.architectures import describe
    from moequant.calibrate import calibrate as measure
    from moequant.files import check_distinct, check_target
    from moequant.pipeline import check_device
    from moequant.tables import export as tables

    options = chosen_calibration(arguments)
    check_device(options.device)
    opened = open_checkpoint(checkpoint, dense_part=without_experts)
    check_distinct([output], [opened.path, *options.texts])
    check_target(output, force=force)
    model = describe(opened)
    with progress_bars(quiet=as_json) as progress:
        imatrix = measure(opened, model, options, progress)
    imatrix.write(output)
    if as_json:
        print_json(tables.imatrix_json(output, imatrix))
        return
    for table in tables.imatrix_tables(output, imatrix):
        out.print(table)


@click.command(short_help="Write the type of every tensor to a file, to edit it.")
@click.argument("checkpoint")
@output_option
@quant_option
@without_experts_option
@click.option("--no-imatrix", is_flag=True, help="Plan for an export without importance.")
@force_option
@json_option
def plan(
    checkpoint: str,
    output: Path,
    preset: str,
    without_experts: bool,
    no_imatrix: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write the type of every tensor to a JSON file; edit it and give it to `export --plan`."""
    from moequant.architectures import describe
    from moequant.files import check_distinct, check_target
    from moequant.pipeline import base_type
    from moequant.plan import preset_plan
    from moequant.tables import export as tables

    opened = open_checkpoint(checkpoint, dense_part=without_experts)
    check_distinct([output], [opened.path])
    check_target(output, force=force)
    model = describe(opened)
    base = base_type(opened, model)
    made = preset_plan(preset, model, has_imatrix=not no_imatrix, base=base)
    made.write(output)
    if as_json:
        print_json(tables.plan_json(made))
        return
    for table in tables.plan_tables(made):
        out.print(table)


@click.command()
@json_option
def presets(as_json: bool) -> None:
    """List the presets: name, default type, what it is."""
    from moequant.plan import PRESETS
    from moequant.tables import export as tables

    if as_json:
        print_json(tables.presets_json(PRESETS))
        return
    out.print(tables.presets_table(PRESETS))

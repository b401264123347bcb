"""The `moequant` command in this process, and an export stage by stage.

Owns: `run` and what tests of several commands share. Leaves out: what the commands should print.
"""

from pathlib import Path

from click.testing import CliRunner, Result

from moequant.cli import main

SHORT = ("--calibration-tokens", "1024", "--sequence-length", "128", "--expert-floor", "8")


def run(*arguments: object) -> Result:
    """What the command printed; an exception that it does not turn into a message is raised."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def export_by_stages(checkpoint: Path, folder: Path, *options: str) -> tuple[Path, Path, Path]:
    """(file made in one go, file made of a saved plan and imatrix, that imatrix)."""
    whole, parts = folder / "whole.gguf", folder / "parts.gguf"
    imatrix, plan = folder / "stage.imatrix.gguf", folder / "plan.json"
    assert run("export", checkpoint, "-o", whole, *options, *SHORT).exit_code == 0
    assert run("calibrate", checkpoint, "-o", imatrix, *options, *SHORT).exit_code == 0
    assert run("plan", checkpoint, "-o", plan, *options).exit_code == 0
    result = run("export", checkpoint, "-o", parts, *options, "--plan", plan, "--imatrix", imatrix)
    assert result.exit_code == 0, result.output
    assert "another checkpoint" not in result.output
    return whole, parts, imatrix

"""The llama.cpp engine: on what llama-perplexity prints and leaves, whole, cut or broken; and on
the tool itself. The fake tools are scripts that leave a file and print what they are given."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from moequant.checkpoint import open_checkpoint
from moequant.cli import main
from moequant.errors import CalibrationError, ExportError, LlamaCppError, MoequantError
from moequant.evaluate import llama_run
from moequant.evaluate.llama_engine import LlamaOptions, LlamaStatistics, llama_statistics
from moequant.evaluate.llama_run import LlamaRun, run_llama_cpp
from moequant.evaluate.logits_file import logits_bytes, read_header
from moequant.evaluate.models import of_checkpoint, open_file
from moequant.evaluate.text import TextOptions, text_windows
from moequant.pipeline import ExportOptions, export
from moequant.runtime import perplexity_tool
from moequant.runtime.llama_cpp import LlamaCpp
from moequant.runtime.perplexity_tool import run_perplexity

WINDOWS, LENGTH, VOCABULARY = 2, 128, 7

HEAD = "chunk  PPL  ln(PPL(Q)/PPL(base))  KL Divergence  Δp RMS  Same top p\n"
RUNNING = (
    "   1   5.0000 ±  1.0000   0.00100 ±  0.00200   0.01 ± 0.01   1.0 ± 0.1 %   97.2 ± 0.1 %\n"
)
STATISTICS = """
====== Perplexity statistics ======
Mean PPL(Q)                   :   6.250000 ±   0.125000
Mean PPL(base)                :   5.000000 ±   0.100000
Cor(ln(PPL(Q)), ln(PPL(base))):  99.93%
Mean ln(PPL(Q)/PPL(base))     :   0.223144 ±   0.003711
Mean PPL(Q)/PPL(base)         :   1.250000 ±   0.004639
Mean PPL(Q)-PPL(base)         :   1.250000 ±   0.030000

====== KL divergence statistics ======
Mean    KLD:   0.025000 ±   0.001000
Maximum KLD:   3.500000
99.9%   KLD:   1.750000
99.0%   KLD:   0.250000
95.0%   KLD:   0.125000
90.0%   KLD:   0.062500
Median  KLD:   0.015625
 1.0%   KLD:   0.000010
Minimum KLD:  -0.000015

====== Token probability statistics ======
Mean    Δp: -0.250 ± 0.020 %
Maximum Δp: 40.000%
RMS Δp    :  2.500 ± 0.060 %
Same top p: 97.500 ± 0.200 %
"""


def predictions(windows: int = WINDOWS, missing: int = 0) -> bytes:
    """A file of predictions as its format has it, `missing` bytes short."""
    data = b"_logits_" + np.array([LENGTH, VOCABULARY, windows], np.int32).tobytes()
    data += np.arange(windows * LENGTH, dtype=np.int32).tobytes()
    data += bytes(windows * 63 * 12 * 2)  # 7 entries take 8, and 4 more: 12 numbers of 2 bytes
    return data[: len(data) - missing]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Statistics by a tool that leaves and says the given in its two runs."""

    def statistics(
        left: bytes = predictions(),
        second: str = HEAD + RUNNING + STATISTICS,
        first: str = "[1]7.0000,[2]8.0000,",
        code: int = 0,
    ) -> LlamaStatistics:
        for name, content in (
            ("left", left),
            ("first", first.encode()),
            ("second", second.encode()),
        ):
            (tmp_path / name).write_bytes(content)
        script = tmp_path / "tool.sh"
        script.write_text(
            "#!/bin/sh\n"
            f"case \"$*\" in *--kl-divergence) cat '{tmp_path}/second'; exit {code};; esac\n"
            f"cp '{tmp_path}/left' '{tmp_path}/logits'; cat '{tmp_path}/first'\n"
        )
        script.chmod(0o755)
        monkeypatch.setattr(perplexity_tool, "tool_command", lambda _: [str(script)])
        options = LlamaOptions(WINDOWS, "user.txt", tmp_path, LENGTH)
        tool = LlamaCpp(tmp_path, tmp_path)
        return llama_statistics(tool, Path("ref.gguf"), Path("q.gguf"), Path("text"), options)

    return statistics


def said(raised: type[MoequantError], ask: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(raised) as caught:
        ask(*arguments, **named)
    return str(caught.value)


def test_statistics_are_read(ask: Any) -> None:
    found: LlamaStatistics = ask()
    assert (found.reference_perplexity.value, found.perplexity.value) == (5.0, 6.25)
    assert (found.ppl_ratio.value, found.ppl_ratio.stderr) == (1.25, 0.004639)
    kld = found.kld
    assert (kld.mean.value, kld.mean.stderr, kld.median) == (0.025, 0.001, 0.015625)
    assert (kld.p90, kld.p95, kld.p99, kld.p999) == (0.0625, 0.125, 0.25, 1.75)
    assert (kld.min, kld.max) == (-0.000015, 3.5)
    assert (found.top1.value, found.top1.stderr) == pytest.approx((0.975, 0.002))
    assert (found.delta_p_mean.value, found.delta_p_rms.value) == pytest.approx((-0.0025, 0.025))
    assert found.tokens.tolist() == np.arange(WINDOWS * LENGTH).reshape(WINDOWS, LENGTH).tolist()


@pytest.mark.parametrize("label", [line.split(":")[0].strip() for line in STATISTICS.splitlines()
                                   if line.startswith(("Mean PPL(Q)  ", "Mean PPL(base", "Median",
                                                       "99.9%   KLD", "RMS", "Same"))])  # fmt: skip
def test_output_that_is_cut_is_no_result(ask: Any, label: str) -> None:
    whole = HEAD + RUNNING + STATISTICS
    cut = whole[: whole.index(f"\n{label}") + len(label)]
    message = said(LlamaCppError, ask, second=cut)
    assert "printed no" in message
    assert "for q.gguf" in message


def test_the_header_of_the_running_table_is_no_end(ask: Any) -> None:
    assert "printed no 'Mean PPL(base)'" in said(LlamaCppError, ask, second=HEAD + RUNNING)


def test_a_failed_run_shows_what_the_tool_said(ask: Any) -> None:
    lines = "E llama_model_load: error loading model: bad magic\n" + "noise\n" * 30
    message = said(LlamaCppError, ask, second=lines, code=1)
    assert "exit code 1" in message
    assert "bad magic" in message
    assert "noise" not in message


def test_predictions_that_could_not_be_read_are_shown(ask: Any) -> None:
    lines = HEAD + "E kl_divergence: failed reading log-probs for chunk 1\n" + "perf: 1 ms\n" * 30
    assert "failed reading log-probs for chunk 1" in said(LlamaCppError, ask, second=lines)


@pytest.mark.parametrize("missing", [1, 300, len(predictions()) - 12])
def test_predictions_cut_short_by_a_full_disk(ask: Any, missing: int) -> None:
    message = said(ExportError, ask, left=predictions(missing=missing))
    assert f"wrote {len(predictions()) - missing} bytes" in message
    assert "TMPDIR" in message
    if missing == 1:
        assert f"{len(predictions())} belong there" in message


def test_a_text_too_short_for_the_tool_is_named(ask: Any) -> None:
    said_by_tool = "E perplexity: you need at least 256 tokens to evaluate perplexity"
    message = said(CalibrationError, ask, left=predictions()[:12], first=said_by_tool)
    assert "user.txt is too short" in message
    assert "--context" in message


@pytest.mark.parametrize("number", ["nan", "-nan", "inf"])
def test_a_figure_that_is_no_number(ask: Any, number: str) -> None:
    broken = STATISTICS.replace("   6.250000 ±   0.125000", f"{number} ± {number}")
    message = said(LlamaCppError, ask, second=broken)
    assert "'Mean PPL(Q)' for q.gguf" in message


def test_the_error_of_a_figure_without_spread_is_0(ask: Any) -> None:
    same = STATISTICS.replace(" 2.500 ± 0.060 %", " 0.000 ±  -nan %")
    found: LlamaStatistics = ask(second=same)
    assert (found.delta_p_rms.value, found.delta_p_rms.stderr) == (0.0, 0.0)


def test_the_windows_are_those_that_the_tool_ran(ask: Any) -> None:
    assert len(ask(left=predictions(windows=1)).tokens) == 1


def test_size_of_the_predictions() -> None:
    assert logits_bytes(WINDOWS, LENGTH, VOCABULARY) == len(predictions())
    assert logits_bytes(32768 // 512, 512, 262144) == pytest.approx(8.6e9, rel=0.01)


@pytest.fixture(scope="module")
def file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "Q4_K.gguf"
    options = ExportOptions(preset="Q4_K_M", calibration=None)
    export(open_checkpoint(str(tiny_model)), path, options)
    return path


@contextmanager
def busy_cores() -> Iterator[None]:
    """Two spinning processes for each core."""
    spin = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(spin) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.llama_cpp
def test_no_line_is_lost_on_a_busy_machine(
    file: Path, tiny_model: Path, llama_cpp: LlamaCpp
) -> None:
    arguments = ["-m", str(file), "-f", str(tiny_model / "held-out.txt"), "-t", "1",
                 "-c", "64", "-b", "64", "--chunks", "2"]  # fmt: skip
    with busy_cores():
        outputs = [run_perplexity(llama_cpp, arguments) for _ in range(5)]
    assert all("Final estimate" in output for output in outputs)


@pytest.mark.llama_cpp
def test_the_format_is_the_tools(
    file: Path, tiny_model: Path, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    logits, text = tmp_path / "logits", tiny_model / "held-out.txt"
    run_perplexity(llama_cpp, ["-m", str(file), "-f", str(text), "-t", "1", "-c", "65", "-b", "65",
                               "--chunks", "3", "--kl-divergence-base", str(logits)])  # fmt: skip
    header = read_header(logits)
    model = open_file(file)
    assert header is not None
    assert header.vocabulary == model.spec.vocab_size
    assert logits.stat().st_size == logits_bytes(3, 65, header.vocabulary)
    windows = text_windows(model, TextOptions((text,), length=65, tokens=3 * 65), from_start=True)
    assert header.tokens[:, 1:].tolist() == windows[:, 1:].tolist()
    assert llama_run._token_notes(header.tokens, windows) == ()


def test_other_tokens_are_noted() -> None:
    ours = torch.arange(12).reshape(3, 4)
    theirs = ours.numpy().astype(np.int32)
    theirs[:, 0] = 99  # where BOS will stand
    assert llama_run._token_notes(theirs, ours) == ()
    theirs[1, 2] = 77
    (note,) = llama_run._token_notes(theirs[:2], ours)
    assert "first difference at token 6 (77, not 6)" in note


def refused(file: Path, model: Path, text: TextOptions) -> str:
    """Why this is not run; neither the checkpoint is written nor the tool started."""

    def never(*_: object) -> None:
        raise AssertionError("the reference was written out")

    base = of_checkpoint(open_checkpoint(str(model)))
    windows = text_windows(base, text, from_start=True)
    with pytest.raises((CalibrationError, ExportError)) as caught:
        run_llama_cpp(open_file(file), base, windows, LlamaRun(text), never, never)
    return str(caught.value)


def test_a_text_of_one_window_is_refused(file: Path, tiny_model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text((tiny_model / "held-out.txt").read_text("utf-8")[:3000], "utf-8")
    message = refused(file, tiny_model, TextOptions((short,)))
    assert message.startswith(f"{short} has fewer than 1024 tokens")
    assert "smaller --context" in message


@pytest.mark.parametrize(
    ("characters", "remedy"), [(None, "use --tokens 224 or more"), (300, "give a longer text")]
)
def test_too_few_scored_tokens_are_refused(
    file: Path, tiny_model: Path, tmp_path: Path, characters: int | None, remedy: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text((tiny_model / "held-out.txt").read_text("utf-8")[:characters], "utf-8")
    message = refused(file, tiny_model, TextOptions((text,), length=32, tokens=64))
    assert f"scores 30 tokens of {text} with --tokens 64 and --context 32" in message
    assert message.endswith(f"fewer than 100: {remedy}.")


def test_a_full_temporary_folder_is_seen_first(
    file: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def full(path: object) -> os.statvfs_result:
        found = list(real(path))  # type: ignore[arg-type]
        found[4] = 0
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", full)
    message = refused(file, tiny_model, TextOptions((tiny_model / "held-out.txt",), tokens=2048))
    assert "has 0.00 GB free" in message
    assert "for 1020 scored tokens" in message
    assert "TMPDIR" in message
    assert "--tokens" in message


@pytest.mark.parametrize(
    "option", [("--sample-tokens", "1024"), ("--compute-dtype", "float32"), ("--device", "cpu")]
)
def test_options_of_the_other_engine(file: Path, tiny_model: Path, option: tuple[str, str]) -> None:
    arguments = ["evaluate", str(file), "--reference", str(tiny_model), "--engine", "llama.cpp"]
    result = CliRunner().invoke(main, [*arguments, *option])
    assert result.exit_code == 2
    assert f"{option[0]}: only for --engine moequant." in result.stderr

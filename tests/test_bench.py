"""Bytes of files counted by hand and by llama.cpp, and the command as it is run."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

from moequant.bench import bench, read_footprint
from moequant.checkpoint import open_checkpoint
from moequant.cli import main
from moequant.errors import GGUFError
from moequant.pipeline import ExportOptions, export
from moequant.runtime.llama_bench import BenchOptions
from moequant.runtime.llama_cpp import LlamaCpp
from moequant.without_experts import without_experts
from tests.banked_files import banked
from tests.checkpoints import make_checkpoint
from tests.gguf_files import rewrite, split

QUICK = BenchOptions(prompt=16, generate=4, repetitions=2, threads=1)
FAST = ("--prompt", "16", "--generate", "4", "--repetitions", "2", "--threads", "1")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["bench", *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(code: int, *arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The example model with and without experts, and an untied Qwen3-MoE."""
    folder = tmp_path_factory.mktemp("bench")
    whole = open_checkpoint(tiny_model)
    qwen = open_checkpoint(make_checkpoint("qwen3-moe", folder / "qwen"))
    made = {"whole": whole, "dense": without_experts(whole), "qwen": qwen}
    for name, checkpoint in made.items():
        options = ExportOptions(preset="Q8_0", calibration=None)
        export(checkpoint, folder / f"{name}.gguf", options)
    return {name: folder / f"{name}.gguf" for name in made}


# --- bytes -----------------------------------------------------------------------------------


def write_by_hand(path: Path, tensors: dict[str, np.ndarray], **keys: Any) -> Path:
    """A file of architecture "toy"; uint8 arrays are Q8_0, 34 bytes for 32 values."""
    writer = gguf.GGUFWriter(path, "toy")
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(f"toy.{key}", value)
        else:
            writer.add_uint32(f"toy.{key}", value)
    for name, values in tensors.items():
        q8 = gguf.GGMLQuantizationType.Q8_0 if values.dtype == np.uint8 else None
        writer.add_tensor(name, values, raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def q8(*shape: int) -> np.ndarray:
    return np.zeros((*shape[:-1], shape[-1] // 32 * 34), np.uint8)


TOY = {
    "token_embd.weight": f32(10, 32),  # 1280 bytes, 128 a row
    "per_layer_token_embd.weight": f32(10, 64),  # 2560 bytes, 256 a row
    "output_norm.weight": f32(32),  # 128
    "blk.0.attn_q.weight": f32(32, 32),  # 4096
    "blk.0.ffn_gate_inp.weight": f32(8, 32),  # 1024, the router is dense
    "blk.0.ffn_up_shexp.weight": f32(16, 32),  # 2048, so is a shared expert
    "blk.0.ffn_up_exps.weight": q8(8, 16, 32),  # 8 * 16 * 34 = 4352
    "blk.1.ffn_down_exps.weight": f32(8, 32, 16),  # 16384
}
DENSE = 128 + 4096 + 1024 + 2048


def test_a_tied_table_is_read_whole_and_a_per_layer_one_by_the_row(tmp_path: Path) -> None:
    path = write_by_hand(tmp_path / "toy.gguf", TOY, expert_count=8, expert_used_count=2)
    found = read_footprint(path)
    assert found.weights == 1280 + 2560 + DENSE + 4352 + 16384
    assert found.experts == 4352 + 16384
    assert found.token_dense == 1280 + 256 + DENSE
    assert found.token_experts == 4352 // 4 + 16384 // 4
    assert found.token == found.token_dense + found.token_experts
    assert (found.expert_count, found.expert_used_count) == (8, 2)
    assert found.file == path.stat().st_size > found.weights
    assert found.bound(1e6) == pytest.approx(1e6 / found.token)


def test_of_an_untied_table_one_row_is_read(tmp_path: Path) -> None:
    tensors = TOY | {"output.weight": f32(10, 32)}
    path = write_by_hand(tmp_path / "toy.gguf", tensors, expert_count=8, expert_used_count=2)
    assert read_footprint(path).token_dense == 128 + 1280 + 256 + DENSE


def test_layers_may_use_different_numbers_of_experts(tmp_path: Path) -> None:
    path = write_by_hand(tmp_path / "toy.gguf", TOY, expert_count=8, expert_used_count=[2, 4])
    assert read_footprint(path).token_experts == 4352 // 4 + 16384 // 2


def test_banks_count_by_the_mean_over_experts(files: dict[str, Path], tmp_path: Path) -> None:
    """Half of the experts in their own type and half in F16: the mean of the two files."""
    path, f16 = tmp_path / "banked.gguf", gguf.GGMLQuantizationType.F16
    banked(files["whole"], path, (None, f16))
    plain, mixed = read_footprint(files["whole"]), read_footprint(path)
    stacks = [t for t in gguf.GGUFReader(files["whole"]).tensors if "_exps.weight" in t.name]
    small = sum(int(t.n_bytes) for t in stacks)
    large = sum(2 * int(t.n_elements) for t in stacks)
    maps = len(stacks) * 2 * 16 * 4  # I32 (banks, experts)
    assert mixed.experts - plain.experts == (small + large) // 2 + maps - small
    assert mixed.token_experts - plain.token_experts == (mixed.experts - plain.experts) // 4
    assert mixed.token_dense == plain.token_dense


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", ["whole", "dense", "qwen", "split"])
def test_llama_cpp_counts_the_same_bytes(
    llama_cpp: LlamaCpp, files: dict[str, Path], tmp_path: Path, name: str
) -> None:
    path = split(files["whole"], tmp_path / "s", 40) if name == "split" else files[name]
    measured = bench([path], QUICK)
    one = measured.files[0]
    assert one.run is not None and one.prompt is not None and one.generation is not None
    assert one.run.model_bytes == one.footprint.weights
    assert one.footprint.token < one.footprint.weights or name == "dense"
    assert one.bandwidth == pytest.approx(one.footprint.token * one.generation.mean)
    if name == "split":
        whole = read_footprint(files["whole"])
        assert one.footprint.token == whole.token and one.footprint.file > whole.file


@pytest.mark.llama_cpp
def test_banks_run_on_the_patched_build_and_not_on_a_stock_one(
    llama_cpp: LlamaCpp, files: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "banked.gguf"
    banked(files["whole"], path, (None, gguf.GGMLQuantizationType.Q4_0))
    measured = bench([files["whole"], path], QUICK)
    assert measured.build.endswith("(pinned, patched)")
    first, second = measured.files
    assert first.generation is not None and second.generation is not None
    assert second.footprint.banked and not first.footprint.banked
    assert second.run is not None and second.run.model_bytes == second.footprint.weights
    assert bench([files["whole"]], QUICK).build.endswith("(pinned)")
    message = refused(2, path, *FAST, "--llama-bench", llama_cpp.tool("llama-bench"))
    assert "banked.gguf keeps experts of one tensor in banks" in message
    assert "`moequant runtime build`" in message


# --- the command -----------------------------------------------------------------------------


@pytest.mark.llama_cpp
def test_the_table_compares_files_with_the_first(
    llama_cpp: LlamaCpp, files: dict[str, Path]
) -> None:
    result = run(files["whole"], files["dense"], *FAST, "--bandwidth", "20")
    assert result.exit_code == 0, result.output
    lines = {line.split("  ")[0].strip(): line for line in result.stdout.splitlines()}
    one, other = read_footprint(files["whole"]), read_footprint(files["dense"])
    assert "whole.gguf" in result.stdout and "dense.gguf" in result.stdout
    assert f"({other.token / one.token:.2f}×)" in lines["bytes per token"]
    for label in ("file", "weights", "pp16", "tg4", "effective bandwidth", "at 20 GB/s"):
        assert "(1.00×)" in lines[label], label
    assert "4 of 16" in result.stdout and "none" in result.stdout
    assert f"≤ {20e9 / one.token:.0f} t/s" in lines["at 20 GB/s"]
    assert "(pinned); CPU" in result.stdout and "one after another" in result.stdout


@pytest.mark.llama_cpp
def test_json_has_every_run(llama_cpp: LlamaCpp, files: dict[str, Path]) -> None:
    tool = llama_cpp.tool("llama-bench")
    result = run(files["whole"], *FAST, "--depth", "8", "--gpu-layers", "0", "--bandwidth", "20",
                 "--llama-bench", tool, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    (one,) = data["files"]
    for test in (one["prompt"], one["generation"]):
        assert len(test["samples"]) == 2
        assert test["mean"] == pytest.approx(statistics.mean(test["samples"]), rel=0.02)
        assert test["stddev"] == pytest.approx(statistics.stdev(test["samples"]), rel=0.05)
    per_token = one["bytes_per_token"]
    assert per_token["total"] == per_token["dense"] + per_token["experts"]
    assert one["bound"] == pytest.approx(20e9 / per_token["total"])
    assert one["effective_bandwidth"] == pytest.approx(
        per_token["total"] * one["generation"]["mean"]
    )
    assert data["bandwidth"] == 20e9
    assert data["options"] == {"prompt": 16, "generate": 4, "depth": 8, "repetitions": 2,
                               "threads": 1, "gpu_layers": 0}  # fmt: skip
    about = data["llama_cpp"]
    assert str(tool) in about["build"] and about["backends"] == "CPU" and about["cpu"]
    assert (about["threads"], about["gpu_layers"]) == (1, 0)


def test_no_run_gives_bytes_and_bound_alone(files: dict[str, Path], tmp_path: Path) -> None:
    result = run(files["whole"], "--no-run", "--bandwidth", "100", "--json")
    data = json.loads(result.stdout)
    (one,) = data["files"]
    assert one["prompt"] is one["generation"] is one["effective_bandwidth"] is None
    assert one["bound"] == pytest.approx(100e9 / one["bytes_per_token"]["total"])
    assert data["llama_cpp"] is data["options"] is None
    twin = tmp_path / "b" / "whole.gguf"  # names that are alike are told apart by their folders
    twin.parent.mkdir()
    twin.symlink_to(files["whole"])
    shown = run(files["whole"], twin, "--no-run")
    assert shown.exit_code == 0 and "tg" not in shown.stdout and "≤" not in shown.stdout
    assert "b/whole.gguf" in shown.stdout


def test_prompt_or_generation_may_be_left_out(llama_cpp: LlamaCpp, files: dict[str, Path]) -> None:
    (one,) = bench([files["dense"]], BenchOptions(0, 4, repetitions=1, threads=1)).files
    assert one.prompt is None and one.generation is not None
    (one,) = bench([files["dense"]], BenchOptions(16, 0, repetitions=1, threads=1)).files
    assert one.prompt is not None and one.bandwidth is None


# --- errors ----------------------------------------------------------------------------------


def test_what_is_no_model_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    text, imatrix = tmp_path / "a.txt", tmp_path / "imatrix.gguf"
    text.write_text("no model at all")
    writer = gguf.GGUFWriter(imatrix, "none")
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", f32(1, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "'imatrix'" in refused(2, files["whole"], imatrix)
    assert "not a GGUF file" in refused(2, text)
    assert "No such file" in refused(2, tmp_path / "missing.gguf")
    assert "Is a directory" in refused(2, tmp_path)
    assert "leave nothing" in refused(2, files["whole"], "--prompt", 0, "--generate", 0)
    assert "--threads" in refused(2, files["whole"], "--no-run", "--threads", 2)
    assert "Missing argument" in refused(2)


def test_experts_without_their_number_are_an_error(files: dict[str, Path], tmp_path: Path) -> None:
    for key, value in (("expert_used_count", None), ("expert_used_count", 17)):
        path = tmp_path / "bad.gguf"
        rewrite(files["whole"], path, keys={f"gemma4.{key}": value})
        with pytest.raises(GGUFError, match=r"layer 0 has experts, but .*expert_used_count"):
            read_footprint(path)


@pytest.mark.llama_cpp
def test_a_model_that_llama_cpp_refuses_is_an_error_with_its_reason(
    llama_cpp: LlamaCpp, files: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "lacking.gguf"
    rewrite(files["dense"], path, tensors={"blk.3.attn_q.weight": None})
    message = refused(1, path, *FAST)
    assert "lacking.gguf: llama-bench failed with 1" in message
    assert "tensor 'blk.3.attn_q.weight' not found" in message


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_tool_that_is_none_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    model = files["dense"]
    assert "cannot be run" in refused(2, model, "--llama-bench", tmp_path / "nowhere")
    plain = tmp_path / "plain"
    plain.write_text("no program")
    assert "cannot be run" in refused(2, model, "--llama-bench", plain)
    echo = script(tmp_path / "echo", "echo hello")
    assert "cannot be read" in refused(1, model, "--llama-bench", echo)
    for body in ("echo '[]'", "echo '[{\"n_gen\": 1}]'", "echo '{}'"):
        wrong = script(tmp_path / "wrong", body)
        assert "cannot be read" in refused(1, model, "--llama-bench", wrong), body
    silent = refused(1, model, "--llama-bench", "/bin/true")
    assert "/bin/true" in silent and "probably no llama-bench" in silent
    killed = script(tmp_path / "killed", "echo no memory left >&2; kill -9 $$")
    message = refused(1, model, "--llama-bench", killed)
    assert "was stopped by signal 9" in message and "no memory left" in message


def test_a_tool_in_the_folder_needs_no_slash(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "my-bench", "echo hello")
    monkeypatch.chdir(tmp_path)
    assert "printed: hello" in refused(1, files["dense"], "--llama-bench", "my-bench")


@pytest.mark.parametrize("value", ["nan", "inf", "1e308", "0", "-1"])
def test_a_bandwidth_is_a_finite_number(files: dict[str, Path], value: str) -> None:
    assert "--bandwidth" in refused(2, files["dense"], "--no-run", "--json", "--bandwidth", value)


def test_more_tokens_than_the_model_was_made_for_are_refused(
    files: dict[str, Path], tmp_path: Path
) -> None:
    tool = script(tmp_path / "tool", "echo hello")
    longest = read_footprint(files["dense"]).context_length
    assert longest is not None
    depth = longest - 512
    options = (files["dense"], "--llama-bench", tool, "--prompt", 512, "--generate", 16, "--depth")
    message = refused(2, *options, depth + 1)
    assert f"made for {longest} tokens" in message and f"needs {longest + 1}" in message
    assert "printed: hello" in refused(1, *options, depth)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_llama_bench_too(
    files: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    """The signal goes to moequant alone, as `kill` sends it, so that nobody else ends the child."""
    pid_file = tmp_path / "pid"
    tool = script(tmp_path / "slow", f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}\n"
                  "trap '' INT\nexec sleep 60")  # fmt: skip
    command = [sys.executable, "-m", "moequant.cli", "bench", files["dense"], "--llama-bench", tool]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 30
    while not pid_file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(pid_file.read_text())
    os.kill(child, 0)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)

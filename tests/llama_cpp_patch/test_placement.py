"""Banks on a second device: where they go, who computes them, and that no logit changes by it.

The device is `device/fake_device.cpp`: memory that the CPU cannot reach, the CPU's plain kernels.
All runs use those kernels (`--no-repack`, no flash attention), so logits are compared to the bit,
with the file without banks on the CPU alone.
"""

import functools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from moequant.checkpoint import open_checkpoint
from moequant.errors import LlamaCppError
from moequant.pipeline import ExportOptions, export
from moequant.runtime.llama_cpp import LlamaCpp, ensure_built
from moequant.runtime.perplexity_tool import run_perplexity
from tests.banked_files import banked
from tests.checkpoints import make_checkpoint
from tests.llama_cpp_patch.fake_device import (
    SWITCH,
    MatMul,
    base_with_switches,
    fake_device,
    read_log,
    rpc_backend,
    rpc_server,
)
from tests.llama_cpp_patch.tiny_gpt_oss import write_gpt_oss, write_lora

TOOLS = ("llama-perplexity", "llama-imatrix", "test-backend-ops")
PARALLEL = ("-fa", "on", "-sm", "tensor", "-ngl", "99")
DECODE = ("-b", "1", "-ub", "1", "--chunks", "1")
ON_DEVICE = ("--device", "Fake0", "-ngl", "99")
# in every prompt the same few experts: with eight banks, some have no expert that is used
MONOTONE = "the " * 1000
Logits = Callable[..., bytes]


@pytest.fixture(scope="module")
def patched() -> LlamaCpp:
    """The pinned llama.cpp with the series; a failure to build fails the test."""
    return ensure_built(TOOLS, patched=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Ordinary files, beside each one with banks, and texts."""
    folder = tmp_path_factory.mktemp("files")
    gemma, qwen, oss = (folder / f"{name}.gguf" for name in ("gemma4", "qwen3-moe", "gpt-oss"))
    export(open_checkpoint(tiny_model), gemma, ExportOptions("Q4_K_M", calibration=None))
    checkpoint = open_checkpoint(make_checkpoint("qwen3-moe", folder / "checkpoint"))
    export(checkpoint, qwen, ExportOptions("Q8_0", calibration=None))
    write_gpt_oss(oss, gemma)
    write_lora(folder / "lora.gguf")
    for path in (gemma, qwen, oss):
        banked(path, folder / f"{path.stem}-banked.gguf", (None, None, None))
    banked(gemma, folder / "gemma4-banked-8.gguf", (None,) * 8)
    (folder / "text").write_bytes((tiny_model / "held-out.txt").read_bytes())
    (folder / "monotone").write_text(MONOTONE)
    return folder


@pytest.fixture(autouse=True)
def device_log(patched: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The device is there for whoever names it, and writes down what it multiplied."""
    monkeypatch.setenv("GGML_BACKEND_PATH", str(fake_device(patched)))
    monkeypatch.setenv("FAKE_DEVICE_LOG", str(tmp_path / "device.jsonl"))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("GGML_NO_BACKTRACE", "1")
    return tmp_path / "device.jsonl"


@pytest.fixture(scope="module")
def logits(patched: LlamaCpp, files: Path) -> Logits:
    """What llama-perplexity computes for a file, with options."""

    def run(name: str, *options: str, text: str = "text") -> bytes:
        saved = files / "logits"
        saved.unlink(missing_ok=True)
        run_perplexity(
            patched,
            ["-m", str(files / f"{name}.gguf"), "-f", str(files / text), "-c", "256",
             "--chunks", "2", "-t", "1", "-fa", "off", "-fit", "off", "--no-repack",
             "--kl-divergence-base", str(saved), *options],
            timeout=120,
        )  # fmt: skip
        data = saved.read_bytes()
        assert len(data) > 128 * 512, "there are logits in it"
        return data

    return run


@pytest.fixture(scope="module")
def on_cpu(logits: Logits) -> Logits:
    """The same for the file on the CPU alone, computed once."""
    return functools.cache(logits)


def banks(path: Path) -> set[str]:
    """The names of a file's banks."""
    return {tensor.name for tensor in gguf.GGUFReader(path).tensors
            if re.search(r"\.bank\d+\.weight$", tensor.name)}  # fmt: skip


def prompts(log: Path) -> list[MatMul]:
    """What the device multiplied, without the two tokens of llama.cpp's warm-up."""
    return [matmul for matmul in read_log(log) if matmul.tokens > 2]


@pytest.mark.parametrize("way", [(), DECODE], ids=["prompt", "decode"])
@pytest.mark.parametrize("name", ["gemma4", "qwen3-moe", "gpt-oss"])
def test_all_banks_on_the_device(
    files: Path, logits: Logits, on_cpu: Logits, device_log: Path, name: str, way: tuple[str, ...]
) -> None:
    expected = on_cpu(name, *way)
    assert not read_log(device_log)
    assert logits(f"{name}-banked", *ON_DEVICE, *way) == expected
    log = read_log(device_log)
    assert {matmul.weight for matmul in log} == banks(files / f"{name}-banked.gguf")
    assert all(matmul.skips and not matmul.copy for matmul in log)
    assert any(matmul.skipped for matmul in log)


# options (the first pattern that fits counts), and which banks are then in the device's memory
PLACES: dict[str, tuple[tuple[str, ...], str]] = {
    "one bank on the CPU": (("-ot", r"bank0\.weight=CPU"), r"bank[12]\.weight"),
    "banks of one tensor": (("-ot", r"blk\.1\.ffn_down_exps\.bank=CPU"), r"^(?!blk\.1\.ffn_down)"),
    "one bank on the device": (("-ngl", "0", "-ot", "bank1=Fake0", "--cpu-moe"), "bank1"),
    "the maps on the CPU": (("-ot", "bank_map=CPU"), "bank"),
    "--cpu-moe": (("--cpu-moe",), "^$"),
    "--n-cpu-moe 1": (("--n-cpu-moe", "1"), r"^(?!blk\.0\.)"),
    "-ngl 3": (("-ngl", "3"), r"blk\.[45]\."),
}


@pytest.mark.parametrize("place", PLACES)
def test_banks_go_where_they_are_sent(
    files: Path, logits: Logits, on_cpu: Logits, device_log: Path, place: str
) -> None:
    options, there = PLACES[place]
    expected = on_cpu("gemma4")
    every = banks(files / "gemma4-banked.gguf")
    resident = {name for name in every if re.search(there, name)}
    # without offloading, an op runs where its weights are
    assert logits("gemma4-banked", *ON_DEVICE, "--no-op-offload", *options) == expected
    log = prompts(device_log)
    assert {matmul.weight for matmul in log} == resident
    assert not any(matmul.copy for matmul in log)
    device_log.unlink(missing_ok=True)
    # with it, the device computes all, and what is not there comes over
    assert logits("gemma4-banked", *ON_DEVICE, *options) == expected
    log = prompts(device_log)
    assert {matmul.weight for matmul in log if not matmul.copy} == resident
    assert {matmul.weight for matmul in log if matmul.copy} == every - resident


def test_offloading_copies_the_experts_that_are_used(
    logits: Logits, on_cpu: Logits, device_log: Path
) -> None:
    expected = on_cpu("gemma4", text="monotone")
    assert logits("gemma4-banked-8", *ON_DEVICE, "--cpu-moe", text="monotone") == expected
    log = prompts(device_log)
    assert all(matmul.copy for matmul in log)
    assert all(matmul.copied == matmul.used for matmul in log)
    assert {len(matmul.used) for matmul in log} == {0, 1, 2}, "banks unused, in part, and whole"


def test_small_batches_stay_on_the_cpu(logits: Logits, on_cpu: Logits, device_log: Path) -> None:
    small = ("-b", "31", "-ub", "31", "--chunks", "1")
    expected = on_cpu("gemma4", *small)
    assert logits("gemma4-banked", *ON_DEVICE, "--cpu-moe", *small) == expected
    assert not read_log(device_log)


# part of patch 0002, number of banks, what ends the process without it
PARTS = {
    "ids": ("gemma4-banked", r"GGML_ASSERT\(id >= 0 && id < n_expert\) failed"),
    "empty": ("gemma4-banked-8", "tensor write out of bounds"),
}


@pytest.mark.parametrize("part", PARTS)
def test_offloading_needs_each_part_of_the_patch(
    patched: LlamaCpp, logits: Logits, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    name, message = PARTS[part]
    monkeypatch.setenv("LD_PRELOAD", str(base_with_switches(patched)))
    options = (*ON_DEVICE, "--cpu-moe")
    assert logits(name, *options, text="monotone")
    monkeypatch.setenv(SWITCH, part)
    with pytest.raises(LlamaCppError, match=message):
        logits(name, *options, text="monotone")


@pytest.mark.parametrize(
    "options", [(), ("-ot", "exps=Fake0"), ("-ngl", "0", "-ot", "bank0=Fake0"), ("--cpu-moe",)]
)
def test_a_device_that_does_not_know_the_flag_gets_no_flagged_op(
    logits: Logits, device_log: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Not even one whose memory a bank was forced into: the bank comes back for each use."""
    monkeypatch.setenv("FAKE_DEVICE_KNOWS_SKIP", "0")
    expected = logits("gemma4", *ON_DEVICE)
    assert len(prompts(device_log)) == 12, "it computes a file without banks"
    device_log.unlink()
    assert logits("gemma4-banked", *ON_DEVICE, *options) == expected
    assert not read_log(device_log)


def test_without_the_gate_such_a_device_would_get_it(
    patched: LlamaCpp, logits: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DEVICE_KNOWS_SKIP", "0")
    monkeypatch.setenv("LD_PRELOAD", str(base_with_switches(patched)))
    monkeypatch.setenv(SWITCH, "gate")
    with pytest.raises(LlamaCppError, match=r"GGML_ASSERT\(i02 >= 0 && i02 < n_as\) failed"):
        logits("gemma4-banked", *ON_DEVICE)


@pytest.mark.parametrize("devices", ["Fake0", "Fake0,Fake1"])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_tensor_parallelism_leaves_banks_on_the_cpu(
    logits: Logits, device_log: Path, monkeypatch: pytest.MonkeyPatch, name: str, devices: str
) -> None:
    """The device over devices knows no flag, whatever those below it know.

    With it, experts' biases are split over the devices; those of banks go to the CPU.
    """
    monkeypatch.setenv("FAKE_DEVICE_COUNT", "2")
    parallel = ("--device", devices, *PARALLEL)
    logits(name, *parallel)
    assert prompts(device_log), "the devices compute a file without banks"
    device_log.unlink()
    expected = logits(name, *parallel, "--cpu-moe")
    assert logits(f"{name}-banked", *parallel) == expected
    assert not read_log(device_log)


# options, and who computes: the first device takes all that is offloaded from the CPU
TWO_PLACES: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "layer by layer": ((), {"Fake0", "Fake1"}),
    "bank by bank": (("-ot", "bank0=Fake0,bank1=Fake1,bank2=CPU"), {"Fake0", "Fake1"}),
    "offloaded": (("--cpu-moe",), {"Fake0"}),
}


@pytest.mark.parametrize("place", TWO_PLACES)
def test_banks_on_two_devices(
    files: Path,
    logits: Logits,
    on_cpu: Logits,
    device_log: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    monkeypatch.setenv("FAKE_DEVICE_COUNT", "2")
    expected = on_cpu("gemma4")
    both = ("--device", "Fake0,Fake1", "-ngl", "99")
    options, computing = TWO_PLACES[place]
    assert logits("gemma4-banked", *both, *options) == expected
    log = prompts(device_log)
    assert {matmul.weight for matmul in log} == banks(files / "gemma4-banked.gguf")
    assert {matmul.device for matmul in log} == computing


def test_fitting_into_little_memory_counts_banks(
    files: Path, logits: Logits, on_cpu: Logits, device_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's own choice of what goes to the device, by sizes that it sees without loading."""
    monkeypatch.setenv("FAKE_DEVICE_MEMORY", "28000000")
    expected = on_cpu("gemma4")
    fitted = ("--device", "Fake0", "-fit", "on", "-fitt", "8", "--no-op-offload")
    assert logits("gemma4-banked", *fitted) == expected
    there = {matmul.weight for matmul in prompts(device_log)}
    assert 0 < len(there) < len(banks(files / "gemma4-banked.gguf"))


def test_rpc_gets_no_flagged_op(
    patched: LlamaCpp,
    logits: Logits,
    on_cpu: Logits,
    device_log: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its client takes every op and asks nobody, so the other end may never have heard of it."""
    expected = on_cpu("gemma4")
    with rpc_server(patched) as address:
        monkeypatch.setenv("GGML_BACKEND_PATH", str(rpc_backend(patched)))
        # -ot makes llama.cpp load the backend, --rpc alone does not
        remote = ("-ot", "no_tensor=CPU", "--rpc", address, "-ngl", "99")
        assert logits("gemma4", *remote) == expected
        assert len(prompts(device_log)) == 12, "the device behind it computes a file without banks"
        device_log.unlink()
        assert logits("gemma4-banked", *remote) == expected
        assert not read_log(device_log)


LORA_PLACES = {
    "CPU": (),
    "device": ON_DEVICE,
    "offloaded": (*ON_DEVICE, "--cpu-moe"),
    "in both": (*ON_DEVICE, "-ot", "bank0=CPU"),
}


@pytest.mark.parametrize("place", LORA_PLACES)
def test_a_lora_for_experts_with_biases(
    logits: Logits, on_cpu: Logits, files: Path, place: str
) -> None:
    """It keeps the router's ids, as the biases do."""
    lora = ("--lora", str(files / "lora.gguf"))
    expected = on_cpu("gpt-oss", *lora)
    assert expected != on_cpu("gpt-oss")
    assert logits("gpt-oss-banked", *lora, *LORA_PLACES[place]) == expected


@pytest.mark.parametrize("options", [(), ("--cpu-moe",)], ids=["on the device", "offloaded"])
def test_llama_imatrix_counts_the_same_on_the_device(
    patched: LlamaCpp, files: Path, device_log: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    found = []
    for place in ((), (*ON_DEVICE, *options)):
        out = tmp_path / "imatrix.gguf"
        command = [str(patched.tool("llama-imatrix")), "-m", str(files / "gemma4-banked.gguf"),
                   "-f", str(files / "text"), "-c", "256", "--chunks", "2", "-t", "1",
                   "-fa", "off", "-fit", "off", "--no-repack", "-o", str(out), *place]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        found.append({tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors})
    assert {matmul.weight for matmul in prompts(device_log)} == banks(files / "gemma4-banked.gguf")
    assert set(found[0]) == set(found[1])
    assert sum(".bank" in name for name in found[0]) == 2 * 36
    for name, values in found[0].items():
        np.testing.assert_array_equal(found[1][name], values, err_msg=name)


@pytest.mark.parametrize("knows", ["1", "0"])
def test_the_kernel_tests_compare_the_device_with_the_cpu(
    patched: LlamaCpp, monkeypatch: pytest.MonkeyPatch, knows: str
) -> None:
    monkeypatch.setenv("FAKE_DEVICE_KNOWS_SKIP", knows)
    command = [str(patched.tool("test-backend-ops")), "test", "-b", "Fake0",
               "-o", "MUL_MAT_ID_SKIP", "-p", "type_a=(f32|q4_K|iq3_s|mxfp4),"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found = re.search(r"(\d+)/(\d+) tests passed", run.stdout)
    assert found is not None, run.stdout[-2000:] + run.stderr[-2000:]
    assert run.returncode == 0, run.stdout[-2000:]
    cases = run.stdout.count("MUL_MAT_ID_SKIP(type_a=")
    assert cases >= 4 * 20
    if knows == "1":
        assert found[0] == f"{cases}/{cases} tests passed"
    else:
        assert found[0] == "0/0 tests passed"
        assert run.stdout.count("not supported") == cases

"""`moequant validate`: the pinned build is right, and deliberately wrong kernels are found."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType

from moequant.gguf_file import read_model
from moequant.runtime.llama_cpp import LlamaCpp, ensure_source
from moequant.validate import reference
from moequant.validate import run as validate_run
from moequant.validate.cases import (
    ROUTINGS,
    SKIPPING,
    Case,
    Limits,
    errors,
    judge,
    route_branch,
    route_op,
    spots,
)
from moequant.validate.weights import read_branch, read_tensor
from tests.banked_files import banked
from tests.checkpoints import make_checkpoint
from tests.command_line import SHORT, run
from tests.gguf_files import rewrite
from tests.llama_cpp_patch.tiny_gpt_oss import write_gpt_oss
from tests.wrong_kernels import SWITCH, wrong_ggml

pytestmark = pytest.mark.llama_cpp
GATE_UP, DOWN = "blk.0.ffn_gate_up_exps.weight", "blk.0.ffn_down_exps.weight"


@pytest.fixture(scope="module")
def gemma(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma") / "q4_k_m.gguf"
    assert run("export", tiny_model, "-o", path, "--quant", "Q4_K_M", *SHORT).exit_code == 0
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random checkpoint, and its files q2_k.gguf and f32.gguf."""
    folder = tmp_path_factory.mktemp("qwen")
    make_checkpoint("qwen3-moe", folder / "checkpoint", dtype=torch.float32)
    for preset in ("Q2_K", "F32"):
        path = folder / f"{preset.lower()}.gguf"
        options = ("--quant", preset, *SHORT)
        assert run("export", folder / "checkpoint", "-o", path, *options).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def wrong() -> Path:
    return wrong_ggml()


def checked(path: Path, *options: object, code: int = 0) -> dict[str, Any]:
    """The JSON of a run that ended with `code`."""
    result = run("validate", path, "--json", "--threads", "2", *options)
    assert result.exit_code == code, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    assert data["passed"] == (code == 0)
    return data


def counts(data: dict[str, Any], **fixed: object) -> dict[str, int]:
    """How many of the cases with these properties have which verdict."""
    verdicts = [c["verdict"] for c in data["cases"] if fixed.items() <= c.items()]
    return {verdict: verdicts.count(verdict) for verdict in set(verdicts)}


def test_the_pinned_build_is_right(gemma: Path, qwen: Path, llama_cpp: LlamaCpp) -> None:
    for path in (gemma, qwen / "q2_k.gguf"):
        data = checked(path)
        assert data["places"][0]["name"] == "CPU/CPU"
        assert counts(data, op="MOE_BRANCH", place="CPU/CPU", subject="blk.0") == {"passed": 32}
        assert counts(data, op="MUL_MAT_ID", place="CPU/CPU", subject=DOWN) == {
            "passed": 32, "not applicable": 24}  # fmt: skip
        told = [case for case in data["cases"] if case["nmse"] is not None]
        assert {c["tokens"] for c in told} == {1, 2, 4, 5, 17, 32, 129, 512}
        assert all(c["part"] == "whole" for c in told)
        ordinary = [case for case in told if case["routing"] != "outliers"]
        assert all(0 < case["nmse"] < 5e-4 for case in ordinary)  # activations are rounded, no more


def test_float_weights_have_a_limit_of_their_own(
    qwen: Path, llama_cpp: LlamaCpp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate_run, "TOKENS", (1, 129))
    data = checked(qwen / "f32.gguf", "--backend", "CPU/CPU")
    told = [case for case in data["cases"] if case["nmse"] is not None]
    assert max(case["nmse_limit"] for case in told) == pytest.approx(3e-8)
    assert all(case["nmse"] < 1e-12 for case in told)


def test_biases_of_experts(
    gemma: Path, wrong: Path, llama_cpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpt-oss.gguf"
    write_gpt_oss(path, gemma)
    monkeypatch.setattr(validate_run, "TOKENS", (1, 129))
    data = checked(path)
    gate, down = (f"blk.0.ffn_{kind}_exps.bias" for kind in ("gate", "down"))
    subjects = {s["name"]: s["what"] for s in data["subjects"] if s["op"] == "ADD_ID"}
    assert subjects == {gate: "F32 12×96", down: "F32 12×128"}
    assert not any("ADD_ID" in note for note in data["notes"])
    for place in (place["name"] for place in data["places"]):
        verdict = "passed" if place == "CPU/CPU" else "not supported"
        assert counts(data, op="ADD_ID", place=place) == {verdict: 12}
    told = [case for case in data["cases"] if case["op"] == "ADD_ID" and case["nmse"] is not None]
    assert all(case["nmse"] < 1e-14 and case["nmse_limit"] == 1e-12 for case in told)
    skipped = f"ADD_ID,{gate},CPU/CPU,17,skipped"
    assert counts(checked(path, "--case", skipped, code=1)) == {"not applicable": 1}

    monkeypatch.setenv(SWITCH, "add_id")
    data = checked(path, "--library", wrong, "--backend", "CPU/CPU", code=1)
    assert counts(data, op="ADD_ID", routing="one") == {"passed": 4}  # of a single slot
    for routing in ("uniform", "rotating"):
        assert counts(data, op="ADD_ID", routing=routing) == {"failed": 4}
    assert "failed" not in counts(data, op="MUL_MAT_ID")
    assert run(*shlex.split(data["worst"]["command"])[1:]).exit_code == 1


@pytest.mark.parametrize(
    ("bias", "told"),
    [
        (np.zeros((12, 95), np.float32), "ffn_up_exps.bias: F32 [12, 95], expected F32 [12, 96]"),
        (np.zeros((12, 96), np.float16), "ffn_up_exps.bias: F16 [12, 96], expected F32 [12, 96]"),
    ],
)
def test_biases_that_do_not_fit(gemma: Path, tmp_path: Path, bias: np.ndarray, told: str) -> None:
    write_gpt_oss(tmp_path / "gpt-oss.gguf", gemma)
    path = tmp_path / "wrong.gguf"
    qtype = GGMLQuantizationType.F32 if bias.itemsize == 4 else GGMLQuantizationType.F16
    rewrite(tmp_path / "gpt-oss.gguf", path, tensors={"blk.1.ffn_up_exps.bias": (bias, qtype)})
    result = run("validate", path)
    assert result.exit_code == 2
    assert told in result.output.replace("\n", " ")


def test_skipped_slots_and_banks(
    gemma: Path, wrong: Path, llama_cpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the patched build, which a banked file gets by itself; not on a stock library."""
    path = tmp_path / "banked.gguf"
    banked(gemma, path)
    monkeypatch.setattr(validate_run, "TOKENS", (1, 2, 17, 129))
    data = checked(path)
    assert "patched-" in data["library"]
    assert data["skips_negative_ids"]
    for routing in SKIPPING:
        assert counts(data, routing=routing, place="CPU/CPU") == {"passed": 16}
    assert counts(data, op="MOE_BRANCH", place="CPU/CPU") == {"passed": 32}
    monkeypatch.setenv(SWITCH, "no_zero")
    monkeypatch.setattr(validate_run, "TOKENS", (17,))
    data = checked(path, "--library", wrong, code=1)  # the branch of banks sees it, too
    assert counts(data, op="MOE_BRANCH", place="CPU/CPU") == {"failed": 8}
    for library in (llama_cpp.binaries, llama_cpp.binaries.parent):
        result = run("validate", path, "--library", library)
        assert result.exit_code == 2
        assert "banked.gguf keeps experts of one tensor in banks" in result.output
        assert "`moequant runtime build`" in result.output


@pytest.mark.parametrize(
    ("fault", "found", "right"),
    [
        ("vec_dot", f"{GATE_UP},CPU/CPU,1,uniform", f"{GATE_UP},CPU/CPU_REPACK,1,uniform"),
        ("repack", f"{GATE_UP},CPU/CPU_REPACK,1,uniform", f"{GATE_UP},CPU/CPU,1,uniform"),
        ("row", f"{DOWN},CPU/CPU,129,uniform", f"{DOWN},CPU/CPU,32,uniform"),
        ("no_zero", f"{DOWN},CPU/CPU,32,skipped", f"{DOWN},CPU/CPU,32,uniform"),
        ("no_zero", f"{DOWN},CPU/CPU,1,skipped-tokens", f"{DOWN},CPU/CPU,1,uniform"),
        ("no_zero", f"{DOWN},CPU/CPU,4,skipped-all", f"{DOWN},CPU/CPU,4,rotating"),
        ("few", f"{DOWN},CPU/CPU,1,skipped", f"{DOWN},CPU/CPU,1,skipped-all"),
        ("few", f"{DOWN},CPU/CPU,2,skipped", f"{DOWN},CPU/CPU,4,skipped"),
        ("high_rows", f"{DOWN},CPU/CPU,1,one", f"{GATE_UP},CPU/CPU_REPACK,1,one"),
        ("scale", f"{DOWN},CPU/CPU,32,uniform", f"{GATE_UP},CPU/CPU_REPACK,32,uniform"),
        ("threads", f"{DOWN},CPU/CPU,32,uniform", f"{GATE_UP},CPU/CPU_REPACK,32,uniform"),
        ("overflow", f"{DOWN},CPU/CPU,32,outliers", f"{DOWN},CPU/CPU,32,uniform"),
    ],
)
def test_wrong_kernels_are_found(
    gemma: Path, wrong: Path, monkeypatch: pytest.MonkeyPatch, fault: str, found: str, right: str
) -> None:
    monkeypatch.setenv(SWITCH, fault)
    places = {place["name"] for place in checked(
        gemma, "--library", wrong, "--backend", "Nonesuch", code=1)["places"]}  # fmt: skip
    if "CPU_REPACK" in found + right and "CPU/CPU_REPACK" not in places:
        pytest.skip("this processor repacks nothing")
    data = checked(gemma, "--library", wrong, "--case", f"MUL_MAT_ID,{found}", code=1)
    assert counts(data) == {"failed": 1}
    data = checked(gemma, "--library", wrong, "--case", f"MUL_MAT_ID,{right}")
    assert counts(data) == {"passed": 1}


def test_an_abort_is_a_finding_and_not_the_end(
    gemma: Path, wrong: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "abort")
    monkeypatch.setattr(validate_run, "TOKENS", (17, 32))
    data = checked(gemma, "--library", wrong, "--backend", "CPU/CPU", code=1)
    assert counts(data, tokens=17, subject=DOWN)["aborted"] == validate_run.MOST_ENDS
    aborted = next(case for case in data["cases"] if case["verdict"] == "aborted")
    assert 'GGML_ASSERT(!(wrong("abort") && ids->ne[1] == 17)) failed' in aborted["detail"]
    assert data["worst"]["verdict"] == "aborted"
    after = f"MUL_MAT_ID,{DOWN},CPU/CPU,32,uniform"
    assert checked(gemma, "--library", wrong, "--case", after)["checked"] == 1


def test_the_worst_case_is_repeated_by_its_command(
    gemma: Path, wrong: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate_run, "TOKENS", (4,))
    monkeypatch.setenv(SWITCH, "vec_dot")
    options = ("--library", wrong, "--rows", "64", "--memory", "0.0002")
    worst = checked(gemma, *options, code=1)["worst"]
    program, *words = shlex.split(worst["command"])
    assert program == "moequant"
    again = run(*words, "--json")
    assert again.exit_code == 1
    (case,) = json.loads(again.stdout)["cases"]
    assert case["nmse"] == worst["nmse"]
    assert case["part"] == worst["part"] != "whole"
    monkeypatch.delenv(SWITCH)
    table = run("validate", gemma, "--library", wrong, "--case", worst["case"])
    assert table.exit_code == 0
    assert worst["case"] in table.output


def test_a_hang_is_a_finding(gemma: Path, wrong: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "hang")
    case = f"MUL_MAT_ID,{DOWN},CPU/CPU,5,one"
    data = checked(gemma, "--library", wrong, "--case", case, "--timeout", "2", code=1)
    assert data["worst"]["verdict"] == "hung"
    assert not psutil.Process().children()


def test_ctrl_c_ends_the_process_that_hangs(gemma: Path, wrong: Path) -> None:
    case = f"MUL_MAT_ID,{DOWN},CPU/CPU,5,one"
    command = [sys.executable, "-m", "moequant.cli", "validate", str(gemma),
               "--library", str(wrong), "--case", case]  # fmt: skip
    with subprocess.Popen(command, env=os.environ | {SWITCH: "hang"}, stderr=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while not (children := psutil.Process(process.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_a_backend_that_is_not_there_is_not_checked(
    gemma: Path, llama_cpp: LlamaCpp, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = checked(gemma, "--backend", "Nonesuch", code=1)
    assert data["not_checked"] == ["Nonesuch"]
    assert data["cases"] == []
    case = f"MUL_MAT_ID,{DOWN},Nonesuch/Nonesuch,5,one"
    assert counts(checked(gemma, "--case", case, code=1)) == {"not checked": 1}
    shown = run("validate", gemma, "--backend", "Nonesuch").output
    assert "not checked" in shown
    assert "passed" not in shown
    monkeypatch.setattr(validate_run, "TOKENS", (1,))
    data = checked(gemma, "--backend", "Nonesuch", "--backend", "CPU/CPU", code=1)
    assert data["checked"] > 0
    assert data["worst"]["verdict"] == "passed"  # and yet not all that was asked for


@pytest.mark.parametrize(
    ("ends", "verdict", "told"),
    [
        ("sys.exit(3)", "error", "exit code 3; what it said"),
        ("os.kill(os.getpid(), 11)", "aborted", "Segmentation fault"),
        ("raise KeyError('something')", "error", "KeyError: 'something'"),
    ],
)
def test_only_a_crash_is_held_against_the_kernels(
    gemma: Path, llama_cpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ends: str, verdict: str, told: str,
) -> None:  # fmt: skip
    broken = f"print('what it said', file=sys.stderr, flush=True); {ends}"
    _reference_that_first(tmp_path, monkeypatch, broken)
    data = checked(gemma, "--case", f"MUL_MAT_ID,{DOWN},CPU/CPU,5,one", code=1)
    (case,) = data["cases"]
    assert case["verdict"] == verdict
    assert told in case["detail"]
    shown = run("validate", gemma, "--case", case["case"]).output
    assert f"{verdict}: MUL_MAT_ID" in shown


def test_the_time_limit_is_for_the_kernels(
    gemma: Path, llama_cpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _reference_that_first(tmp_path, monkeypatch, "time.sleep(3)")
    case = f"MUL_MAT_ID,{DOWN},CPU/CPU,5,one"
    assert checked(gemma, "--case", case, "--timeout", "2")["checked"] == 1
    monkeypatch.setattr(validate_run, "PREPARE", 0.5)
    (told,) = checked(gemma, "--case", case, code=1)["cases"]
    assert (told["verdict"], told["detail"]) == ("error", "not ready within 0.5 s")


def _reference_that_first(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """In the process that runs cases."""
    (folder / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "from moequant.validate import reference\n"
        "right = reference.mul_mat_id\n"
        "def changed(*arguments):\n"
        f"    {does}\n"
        "    return right(*arguments)\n"
        "reference.mul_mat_id = changed\n"
    )
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


def _up_file(path: Path, data: np.ndarray, qtype: GGMLQuantizationType) -> Path:
    """A file with one stack of experts, [experts, rows, row bytes], two of them for a token."""
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_expert_used_count(2)
    writer.add_tensor("blk.0.ffn_up_exps.weight", data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_quiet_expert_must_be_right_too(
    wrong: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate_run, "TOKENS", (32,))
    monkeypatch.setenv(SWITCH, "expert_3")
    values = np.random.default_rng(0).standard_normal((64, 32, 256)).astype(np.float32)
    values[3] *= 0.01
    data = gguf.quantize(values, GGMLQuantizationType.Q8_0)
    path = _up_file(tmp_path / "quiet.gguf", data, GGMLQuantizationType.Q8_0)
    options = ("--library", wrong, "--backend", "CPU/CPU")
    data = checked(path, *options, code=1)
    assert counts(data, routing="rotating") == {"failed": 1}
    found = next(case for case in data["cases"] if case["routing"] == "rotating")
    assert found["nmse"] < 5e-4
    assert "a value is off" in found["detail"]


def test_a_branch_has_all_its_experts(
    wrong: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the upper half of 128, at the width of a large model."""
    monkeypatch.setattr(validate_run, "TOKENS", (32,))
    path = _wide_qwen(tmp_path / "wide.gguf")
    options = ("--library", wrong, "--backend", "CPU/CPU")
    assert counts(checked(path, *options), op="MOE_BRANCH") == {"passed": 4}
    monkeypatch.setenv(SWITCH, "expert_64")
    data = checked(path, *options, code=1)
    assert counts(data, op="MOE_BRANCH", routing="uniform") == {"failed": 1}


def _wide_qwen(path: Path) -> Path:
    """128 experts of 64 and a width of 1024, more than a branch's reference decodes."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_expert_used_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    q8_0 = GGMLQuantizationType.Q8_0
    for kind, shape in (("gate", (64, 1024)), ("up", (64, 1024)), ("down", (1024, 64))):
        matrix = gguf.quantize(random.standard_normal(shape).astype(np.float32) * 0.05, q8_0)
        data = np.stack([np.roll(matrix, expert, axis=0) for expert in range(128)])
        writer.add_tensor(f"blk.0.ffn_{kind}_exps.weight", data, raw_dtype=q8_0)
    router = random.standard_normal((128, 1024)).astype(np.float32) * 0.05
    writer.add_tensor("blk.0.ffn_gate_inp.weight", router)
    writer.add_tensor("blk.0.ffn_norm.weight", np.ones(1024, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_bank_has_the_slots_of_the_layer(
    gemma: Path, wrong: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that fails where a token has more slots than the bank has experts."""
    path = tmp_path / "narrow.gguf"
    banked(gemma, path, (None,) * 8)  # of two experts each; a token has four
    monkeypatch.setattr(validate_run, "TOKENS", (17,))
    options = ("--library", wrong, "--backend", "CPU/CPU")
    assert counts(checked(path, *options), op="MUL_MAT_ID", routing="uniform") == {"passed": 3}
    monkeypatch.setenv(SWITCH, "wide")
    data = checked(path, *options, code=1)
    assert counts(data, op="MUL_MAT_ID", routing="uniform") == {"failed": 3}


def test_what_does_not_fit_into_memory_is_cut_and_told(
    gemma: Path, llama_cpp: LlamaCpp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate_run, "TOKENS", (5,))
    data = checked(gemma, "--memory", "0.0002")
    parts = {case["subject"]: case["part"] for case in data["cases"] if case["part"]}
    assert parts[GATE_UP] == "7 of 16 experts: `--memory`"
    assert parts["blk.0"] == "32 of 96 columns of the experts' width: `--memory`"
    assert "cut to fit into memory: blk.0: 32 of 96" in run(
        "validate", gemma, "--memory", "0.0002").output  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "tensors", "told"),
    [
        ({"expert_used_count": None}, (), "no key gemma4.expert_used_count"),
        ({"expert_used_count": 0}, (), "gemma4.expert_used_count is 0, not a count"),
        ({"expert_used_count": "many"}, (), "gemma4.expert_used_count is 'many', not a count"),
        ({"expert_used_count": 17}, (), f"{DOWN}: 16 experts, but expert_used_count is 17"),
        ({"attention.layer_norm_rms_epsilon": None}, (), "no key gemma4.attention.layer_norm_rms"),
        ({}, ("ffn_gate_inp.weight",), "blk.0.ffn_gate_inp.weight: missing"),
        ({}, ("pre_ffw_norm_2.weight", "ffn_norm.weight"), "blk.0.ffn_norm.weight: missing"),
    ],
)
def test_a_file_that_lacks_something_says_so(
    gemma: Path, tmp_path: Path, keys: dict[str, object], tensors: tuple[str, ...], told: str
) -> None:
    path = tmp_path / "lacking.gguf"
    rewrite(gemma, path, keys={f"gemma4.{key}": value for key, value in keys.items()},
            tensors={f"blk.0.{name}": None for name in tensors})  # fmt: skip
    result = run("validate", path)
    assert result.exit_code == 2
    assert told in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--case", "nonsense"), 2, "is no case"),
        (("--timeout", "nan"), 2, "nan is no number"),
        (("--case", "MUL_MAT_ID,blk.9.ffn_up_exps.weight,CPU/CPU,5,one"), 2, "has no blk.9"),
        (("--library", "{empty}"), 1, "shared libraries"),
        (("--library", "{broken}"), 1, "libggml-base.so"),
    ],
)
def test_bad_input(
    gemma: Path, tmp_path: Path, options: tuple[str, str], code: int, told: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for name in ("libggml.so", "libggml-base.so"):
        (tmp_path / "broken" / name).write_text("no library")
    name, value = options
    value = value.format(empty=tmp_path / "empty", broken=tmp_path / "broken")
    result = run("validate", gemma, name, value)
    assert result.exit_code == code
    assert told in result.output
    assert "Traceback" not in result.output


def test_a_file_without_experts() -> None:
    result = run("validate", ensure_source() / "models" / "ggml-vocab-qwen2.gguf")
    assert result.exit_code == 2
    assert "no expert tensors" in result.output


def test_the_reference_is_the_models_own_branch(qwen: Path) -> None:
    """Against transformers' layer, with its own routing, on the F32 file."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        qwen / "checkpoint", dtype=torch.float32
    )
    layer = model.model.layers[0]
    branch = read_branch(read_model(qwen / "f32.gguf"), 0, 1 << 30)
    x = np.random.default_rng(0).standard_normal((9, branch.width), np.float32)
    with torch.no_grad():
        output = layer.mlp(layer.post_attention_layernorm(torch.from_numpy(x)[None]))
        theirs = (output[0] if isinstance(output, tuple) else output)[0].numpy()
    logits = reference.router_logits(branch, x.astype(np.float64))
    ids = np.argsort(-logits, axis=1)[:, : branch.k].astype(np.int32)
    bias = np.zeros(logits.shape, np.float32)
    ours = reference.branch_outputs(branch, x.astype(np.float64), bias, ids)["experts"]
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("axis", [0, 1])
def test_one_wrong_row_of_many_is_seen(axis: int) -> None:
    expected = np.random.default_rng(0).standard_normal((4096, 4096))
    got = expected.astype(np.float32)
    got[(7, slice(None)) if axis == 0 else (slice(None), 7)] *= 0
    found = errors(got, expected, np.ones((1, 1)))
    assert found.nmse < 5e-4
    assert found.value > 0.9
    got[0, 0] = np.nan
    assert np.isnan(errors(got, expected, np.ones((1, 1))).nmse)


def test_a_small_error_of_all_values_is_seen() -> None:
    case = Case("MUL_MAT_ID", DOWN, "CPU/CPU", 512, "uniform")
    random = np.random.default_rng(0)
    expected = random.standard_normal((512, 64))
    noise = random.standard_normal((512, 64)) * 6e-3  # as of activations of 8 bits
    for factor, verdict in ((1.0, "passed"), (1.01, "failed"), (0.99, "failed")):
        found = errors((expected * factor + noise).astype(np.float32), expected, np.ones((1, 1)))
        assert found.nmse < 5e-4
        assert judge(case, found, Limits(5e-4)).verdict == verdict


def test_routings_name_no_expert_twice_and_reach_all() -> None:
    whole = np.arange(16, dtype=np.int32)
    for routing in ROUTINGS:
        case = Case("MUL_MAT_ID", DOWN, "CPU/CPU", 129, routing)
        ids = route_op(case, whole, 4, np.random.default_rng(case.seed))
        for token in ids:
            kept = token[token >= 0]
            assert len(set(kept)) == len(kept)
        reached = set(ids[ids >= 0].tolist())
        assert len(reached) == {"one": 1, "skipped-all": 0}.get(routing, 16)
        assert (ids < 0).any() == (routing in SKIPPING)
        assert (ids < 0).all(axis=1).any() == (routing in SKIPPING[1:])


@pytest.mark.parametrize("tokens", [1, 2])
def test_few_tokens_have_slots_of_both_kinds(tokens: int) -> None:
    case = Case("MUL_MAT_ID", DOWN, "CPU/CPU", tokens, "skipped")
    ids = route_op(case, np.arange(16, dtype=np.int32), 4, np.random.default_rng(case.seed))
    assert (ids < 0).any(axis=1).all()
    assert (ids >= 0).any(axis=1).all()


def test_a_banks_slots_are_the_layers(gemma: Path, tmp_path: Path) -> None:
    path = tmp_path / "narrow.gguf"
    banked(gemma, path, (None,) * 8)
    name = DOWN.replace(".weight", ".bank1.weight")
    tensor = read_tensor(read_model(path), name, 1 << 30)
    assert tensor.table.tolist() == [-1, 1, *[-1] * 7, 0, *[-1] * 6]  # experts 1 and 9
    for routing in ROUTINGS:
        case = Case("MUL_MAT_ID", name, "CPU/CPU", 2, routing)
        ids = route_op(case, tensor.table, 4, np.random.default_rng(case.seed))
        assert ids.shape == (2, 4)
        assert (ids >= 0).any() or routing in SKIPPING


def test_tokens_of_a_branch_that_are_checked() -> None:
    known = np.array([0, 5, 9, 31, 63])
    for routing in ("uniform", "rotating", "one", "outliers"):
        case = Case("MOE_BRANCH", "blk.0", "CPU/CPU", 512, routing)
        ids, checked = route_branch(case, 64, 4, known, np.random.default_rng(case.seed))
        assert {0, 31, 32, 63, 64, 127, 128, 511} <= set(checked.tolist())
        assert len(checked) == 32
        assert np.isin(ids[checked], known).all()
        assert len(np.unique(ids)) == (4 if routing == "one" else 64)


def test_rows_that_are_compared() -> None:
    random = np.random.default_rng(0)
    assert spots(64, 64, random).tolist() == list(range(64))
    rows = spots(768, 64, random)
    assert len(set(rows.tolist())) == 64
    assert {0, 63, 64, 127, 128, 766, 767} <= set(rows.tolist())

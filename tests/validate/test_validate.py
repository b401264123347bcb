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

import numpy as np
import psutil
import pytest
import torch
import transformers

from moequant.gguf_file import read_model
from moequant.runtime.llama_cpp import LlamaCpp, ensure_source
from moequant.validate import reference
from moequant.validate import run as validate_run
from moequant.validate.cases import Case, errors, route
from moequant.validate.weights import read_branch
from tests.banked_files import banked
from tests.checkpoints import make_checkpoint
from tests.command_line import SHORT, run
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
        assert counts(data, op="MOE_BRANCH", place="CPU/CPU", subject="blk.0") == {"passed": 24}
        assert counts(data, op="MUL_MAT_ID", place="CPU/CPU", subject=DOWN) == {
            "passed": 24, "not applicable": 8}  # fmt: skip
        told = [case for case in data["cases"] if case["nmse"] is not None]
        assert all(0 < case["nmse"] < 5e-4 for case in told)  # activations are rounded, and no more
        assert {c["tokens"] for c in told} == {1, 2, 4, 5, 17, 32, 129, 512}


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
    assert counts(data, routing="skipped", place="CPU/CPU") == {"passed": 16}
    assert counts(data, op="MOE_BRANCH", place="CPU/CPU") == {"passed": 24}
    monkeypatch.setenv(SWITCH, "no_zero")
    monkeypatch.setattr(validate_run, "TOKENS", (17,))
    data = checked(path, "--library", wrong, code=1)  # the branch of banks sees it, too
    assert counts(data, op="MOE_BRANCH", place="CPU/CPU") == {"failed": 6}
    for library in (llama_cpp.binaries, llama_cpp.binaries.parent):
        result = run("validate", path, "--library", library)
        assert result.exit_code == 2
        assert "banked.gguf keeps experts of one tensor in banks" in result.output
        assert "`moequant runtime build`" in result.output


@pytest.mark.parametrize(
    ("fault", "place", "found", "right"),
    [
        ("vec_dot", "CPU/CPU", {"tokens": 1}, {"place": "CPU/CPU_REPACK", "op": "MUL_MAT_ID"}),
        ("repack", "CPU/CPU_REPACK", {"tokens": 1}, {"place": "CPU/CPU"}),
        ("row", "CPU/CPU", {"tokens": 129, "subject": DOWN}, {"tokens": 32}),
        ("no_zero", "CPU/CPU", {"routing": "skipped"}, {"routing": "uniform"}),
    ],
)
def test_wrong_kernels_are_found(
    gemma: Path, wrong: Path, monkeypatch: pytest.MonkeyPatch,
    fault: str, place: str, found: dict[str, object], right: dict[str, object],
) -> None:  # fmt: skip
    monkeypatch.setenv(SWITCH, fault)
    monkeypatch.setattr(validate_run, "TOKENS", (1, 32, 129))
    data = checked(gemma, "--library", wrong, code=1)
    if place not in [p["name"] for p in data["places"]]:
        pytest.skip(f"this processor has no {place}")
    verdicts = counts(data, place=place, **found)
    assert verdicts.get("failed"), verdicts
    assert "failed" not in counts(data, **right)
    assert counts(data, **right)["passed"]


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
    options = ("--library", wrong, "--rows", "64", "--experts", "8")
    worst = checked(gemma, *options, code=1)["worst"]
    program, *words = shlex.split(worst["command"])
    assert program == "moequant"
    again = run(*words, "--json")
    assert again.exit_code == 1
    (case,) = json.loads(again.stdout)["cases"]
    assert case["nmse"] == worst["nmse"]
    assert "8 of 16 experts" in case["part"]
    table = run("validate", gemma, "--case", worst["case"])  # on the pinned build
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


def test_a_backend_that_is_not_there_is_not_checked(gemma: Path, llama_cpp: LlamaCpp) -> None:
    data = checked(gemma, "--backend", "Nonesuch", code=1)
    assert data["not_checked"] == ["Nonesuch"]
    assert data["cases"] == []
    case = f"MUL_MAT_ID,{DOWN},Nonesuch/Nonesuch,5,one"
    assert counts(checked(gemma, "--case", case, code=1)) == {"not checked": 1}
    shown = run("validate", gemma, "--backend", "Nonesuch").output
    assert "not checked" in shown
    assert "passed" not in shown


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--case", "nonsense"), 2, "is no case"),
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
    branch = read_branch(read_model(qwen / "f32.gguf"), 0, 0, 0)
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
    nmse, row = errors(got, expected)
    assert nmse < 5e-4
    assert row > 0.9
    got[0, 0] = np.nan
    assert np.isnan(errors(got, expected)[0])


def test_routings_name_no_expert_twice_and_reach_all() -> None:
    for routing in ("uniform", "rotating", "one", "skipped"):
        case = Case("MUL_MAT_ID", DOWN, "CPU/CPU", 129, routing)
        ids = route(case, 16, 4, np.random.default_rng(case.seed))
        for token in ids:
            kept = token[token >= 0]
            assert len(set(kept)) == len(kept)
        reached = set(ids[ids >= 0].tolist())
        assert len(reached) == (1 if routing == "one" else 16)
        assert ((ids < 0).any(), (ids < 0).all(axis=1).any()) == ((routing == "skipped",) * 2)

"""The patched llama.cpp runs expert banks and refuses damaged ones; the stock one refuses all."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

from moequant.checkpoint import open_checkpoint
from moequant.errors import LlamaCppError
from moequant.pipeline import ExportOptions, export
from moequant.runtime.llama_cpp import LlamaCpp, ensure_built
from moequant.runtime.perplexity_tool import run_perplexity
from tests.banked_files import banked
from tests.checkpoints import make_checkpoint
from tests.gguf_files import Value

Tensors = dict[str, Value]
CONTEXT = 256
WINDOWS = 2
STACK = "blk.1.ffn_down_exps"
MAP, BANK0, BANK1 = f"{STACK}.bank_map", f"{STACK}.bank0.weight", f"{STACK}.bank1.weight"
# every expert type that a preset gives or falls back to comes up in these two
PRESETS = ("Q4_K_M", "IQ4_XS")
# one prompt; repacked kernels; one token at a time; a last batch with a few tokens
WAYS = {
    "repacked": (),
    "plain": ("--no-repack", "-fa", "off"),
    "decode": ("-b", "1", "-ub", "1", "-fa", "on"),
    "uneven": ("-ub", "129"),
    "on the CPU": ("--cpu-moe",),
}


@pytest.fixture(scope="module")
def patched() -> LlamaCpp:
    """The pinned llama.cpp with the series; a failure to build fails the test."""
    tools = ("llama-perplexity", "llama-imatrix", "llama-quantize", "test-backend-ops")
    return ensure_built(tools, patched=True)


@pytest.fixture(scope="module")
def text(tiny_model: Path) -> Path:
    return tiny_model / "held-out.txt"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Ordinary files, and beside each one with the same experts in three banks."""
    folder = tmp_path_factory.mktemp("files")
    for preset in ("F32", *PRESETS):
        path = folder / f"{preset}.gguf"
        export(open_checkpoint(tiny_model), path, ExportOptions(preset, calibration=None))
        banked(path, folder / f"{preset}-banked.gguf", (None, None, None))
    checkpoint = open_checkpoint(make_checkpoint("qwen3-moe", folder / "qwen3-moe"))
    export(checkpoint, folder / "qwen3-moe.gguf", ExportOptions("Q8_0", calibration=None))
    banked(folder / "qwen3-moe.gguf", folder / "qwen3-moe-banked.gguf", (None, None))
    return folder


def arguments(model: Path, text: Path, *more: str, windows: int = WINDOWS) -> list[str]:
    return ["-m", str(model), "-f", str(text), "-c", str(CONTEXT), "--chunks", str(windows),
            "-t", "2", *more]  # fmt: skip


def perplexity(output: str) -> float:
    found = re.search(r"Final estimate: PPL = ([\d.]+)", output)
    assert found is not None, output
    return float(found[1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*PRESETS, "qwen3-moe"])
def test_banks_of_one_type_change_no_logit(
    patched: LlamaCpp, files: Path, text: Path, tmp_path: Path, name: str, way: str
) -> None:
    windows = 1 if way == "decode" else WINDOWS
    saved = []
    for model in (files / f"{name}.gguf", files / f"{name}-banked.gguf"):
        logits = tmp_path / f"{model.stem}.logits"
        run_perplexity(patched, arguments(model, text, *WAYS[way], "--kl-divergence-base",
                                          str(logits), windows=windows))  # fmt: skip
        saved.append(logits.read_bytes())
    assert len(saved[0]) > CONTEXT // 2 * 512, "there are logits in it"
    assert saved[0] == saved[1]


@pytest.mark.parametrize("way", WAYS)
def test_banks_of_several_types_are_near_the_original(
    patched: LlamaCpp, files: Path, text: Path, tmp_path: Path, way: str
) -> None:
    mixed = tmp_path / "mixed.gguf"
    banked(files / "F32.gguf", mixed, (QType.Q8_0, QType.F16, QType.Q8_0, QType.BF16))
    first, second = (
        perplexity(run_perplexity(patched, arguments(model, text, *WAYS[way], windows=1)))
        for model in (files / "F32.gguf", mixed)
    )
    assert second == pytest.approx(first, rel=0.01)


@pytest.mark.parametrize("way", ["repacked", "plain", "decode"])
def test_banks_summed_in_place_are_those_summed_op_by_op(
    patched: LlamaCpp, files: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, way: str,
) -> None:  # fmt: skip
    """With 2 to 4 banks of different types, of which some are repacked."""
    for types in ((QType.Q8_0, None), (None, QType.Q4_0, None, QType.Q8_0)):
        banked(files / "Q4_K_M.gguf", tmp_path / "mixed.gguf", types)
        saved = []
        for off in ("0", "1"):
            monkeypatch.setenv("GGML_CPU_DISABLE_FUSION", off)
            logits = tmp_path / f"{off}.logits"
            run_perplexity(patched, arguments(tmp_path / "mixed.gguf", text, *WAYS[way],
                                              "--kl-divergence-base", str(logits),
                                              windows=1))  # fmt: skip
            saved.append(logits.read_bytes())
        assert saved[0] == saved[1]
        assert len(saved[0]) > CONTEXT // 2 * 512


def test_the_stock_one_refuses_banks(llama_cpp: LlamaCpp, files: Path, text: Path) -> None:
    with pytest.raises(LlamaCppError, match=r"exit code 1:(.|\n)*ffn_\w+_exps.weight' not found"):
        run_perplexity(llama_cpp, arguments(files / "Q4_K_M-banked.gguf", text))


def at(bank: int, expert: int, index: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[MAP][0][bank, expert] = index

    return change


def with_map(change: Callable[[np.ndarray], np.ndarray], qtype: QType) -> Callable[..., None]:
    def changed(tensors: Tensors) -> None:
        tensors[MAP] = (np.ascontiguousarray(change(tensors[MAP][0])), qtype)

    return changed


def with_bank(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    def changed(tensors: Tensors) -> None:
        values, qtype = tensors[BANK0]
        tensors[BANK0] = (np.ascontiguousarray(change(values)), qtype)

    return changed


def one_more(tensors: Tensors) -> None:
    tensors[f"{STACK}.bank2.weight"] = tensors[BANK0]


def whole_as_well(tensors: Tensors) -> None:
    tensors[f"{STACK}.weight"] = tensors[BANK0]


# expert e is in bank e % 2; there the order is reversed: expert 0 is matrix 7 of bank 0
DAMAGE: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "beyond the bank": (at(1, 3, 99), f"'{MAP}': expert 3 is matrix 99 of bank 1, which has 8"),
    "below -1": (at(1, 3, -2), f"'{MAP}': expert 3 is matrix -2 of bank 1, which has 8"),
    "nowhere": (at(0, 0, -1), f"'{MAP}': expert 0 is in 0 banks, expected 1"),
    "one matrix twice": (at(0, 0, 6), f"'{MAP}': experts 0 and 2 are both matrix 6 of bank 0"),
    "in two banks": (at(1, 0, 7), f"'{MAP}': experts 0 and 1 are both matrix 7 of bank 1"),
    "no bank": (lambda t: t.pop(BANK1), f"missing expert bank '{BANK1}', map '{MAP}' has 2 banks"),
    "no map": (lambda t: t.pop(MAP), f"missing tensor '{MAP}' of the expert bank '{BANK0}'"),
    "map of I64": (with_map(lambda m: m.astype(np.int64), QType.I64), f"'{MAP}' is i64"),
    "short map": (with_map(lambda m: m[:, :-1], QType.I32), f"hold 16 experts, map '{MAP}' has 15"),
    "short bank": (with_bank(lambda b: b[:-1]), f"hold 15 experts, map '{MAP}' has 16"),
    "few rows": (with_bank(lambda b: b[:, :-32]), f"'{BANK0}' has wrong shape; expected"),
    "a bank too many": (one_more, f"bank2.weight' is not in map '{MAP}', which has 2 banks"),
    "whole as well": (whole_as_well, f"'{STACK}.weight' is there as a whole and in expert banks"),
}
KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "version 2": ({"version": 2}, "expert_bank_version is 2, this llama.cpp reads version 1"),
    "no version": ({"version": None}, "there is no key gemma4.expert_bank_version"),
    "count": ({"count": 3}, "gemma4.expert_bank_count is 3, but the most expert banks of a tensor"),
}  # fmt: skip


def refused(patched: LlamaCpp, model: Path, text: Path, message: str) -> None:
    with pytest.raises(LlamaCppError) as caught:
        run_perplexity(patched, arguments(model, text))
    assert "exit code 1:" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_banks_are_refused_by_name(
    patched: LlamaCpp, files: Path, text: Path, tmp_path: Path, damage: str
) -> None:
    change, message = DAMAGE[damage]
    banked(files / "Q4_K_M.gguf", tmp_path / "bad.gguf", (None, None), change=change)
    refused(patched, tmp_path / "bad.gguf", text, message)


@pytest.mark.parametrize("key", KEYS)
def test_keys_that_do_not_fit_are_refused(
    patched: LlamaCpp, files: Path, text: Path, tmp_path: Path, key: str
) -> None:
    changes, message = KEYS[key]
    banked(files / "Q4_K_M.gguf", tmp_path / "bad.gguf", (None, None), **changes)
    refused(patched, tmp_path / "bad.gguf", text, message)


@pytest.mark.parametrize(("ftype", "code"), [("Q4_K_M", 1), ("COPY", 0)])
def test_llama_quantize_refuses_banks_but_copies_them(
    patched: LlamaCpp, files: Path, tmp_path: Path, ftype: str, code: int
) -> None:
    """It would give all banks one type, and leave what moequant says of them in the file."""
    source, target = files / "Q4_K_M-banked.gguf", tmp_path / "out.gguf"
    command = [str(patched.tool("llama-quantize")), "--allow-requantize", str(source),
               str(target), ftype, "1"]  # fmt: skip
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                         timeout=120)  # fmt: skip
    said = run.stdout.decode("utf-8", "replace")  # it cuts values of keys inside of characters
    assert run.returncode == code, said
    if code:
        assert re.search(r"'blk\.0\.ffn_\w+_exps\.bank0\.weight' is an expert bank", said)
    else:
        before, after = (
            {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
            for path in (source, target)
        )
        assert before == after


def test_llama_imatrix_counts_each_expert_in_its_bank(
    patched: LlamaCpp, files: Path, text: Path, tmp_path: Path
) -> None:
    found = []
    for name in ("Q4_K_M", "Q4_K_M-banked"):
        out = tmp_path / f"{name}.imatrix.gguf"
        command = [str(patched.tool("llama-imatrix")),
                   *arguments(files / f"{name}.gguf", text, "-o", str(out))]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        found.append({tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors})
    whole, banks = found
    maps = {tensor.name: tensor.data
            for tensor in gguf.GGUFReader(files / "Q4_K_M-banked.gguf").tensors
            if tensor.name.endswith(".bank_map")}  # fmt: skip
    for name, table in maps.items():
        stem = name.removesuffix(".bank_map")
        for part in ("in_sum2", "counts"):
            expected = whole[f"{stem}.weight.{part}"].reshape(table.shape[1], -1)
            for bank, row in enumerate(table):
                got = banks[f"{stem}.bank{bank}.weight.{part}"]
                got = got.reshape((row >= 0).sum(), -1)
                np.testing.assert_array_equal(got[row[row >= 0]], expected[row >= 0])


def test_the_kernel_tests_pass_for_skipped_ids(patched: LlamaCpp) -> None:
    command = [str(patched.tool("test-backend-ops")), "test", "-b", "CPU", "-o", "MUL_MAT_ID_SKIP"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    found = re.search(r"(\d+)/(\d+) tests passed", run.stdout)
    assert found is not None, run.stdout[-2000:] + run.stderr[-2000:]
    assert run.returncode == 0, run.stdout[-2000:]
    assert found[1] == found[2]
    assert int(found[2]) > 500

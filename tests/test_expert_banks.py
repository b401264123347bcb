"""Expert banks: every expert is found where gguf-py wrote it, and damaged maps are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from moequant.checkpoint import open_checkpoint
from moequant.errors import GGUFError, LlamaCppError
from moequant.expert_banks import bank_name, is_bank_part, map_name, read_banks
from moequant.gguf_file import read_gguf
from moequant.inspection import inspect
from moequant.pipeline import ExportOptions, export
from moequant.runtime.llama_cpp import LlamaCpp
from moequant.runtime.perplexity_tool import run_perplexity
from tests.banked_files import I32, Q8_0, banked
from tests.checkpoints import TEXT, make_checkpoint
from tests.command_line import run
from tests.gguf_files import rewrite

STACK = "blk.1.ffn_down_exps.weight"
MAP, FIRST, SECOND = map_name(STACK), bank_name(STACK, 0), bank_name(STACK, 1)
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    source = make_checkpoint("gemma4-additive-some-layers", folder / "checkpoint")
    export(open_checkpoint(source), folder / "whole.gguf", ExportOptions("F32", calibration=None))
    return folder / "whole.gguf"


def test_names() -> None:
    assert (MAP, SECOND) == ("blk.1.ffn_down_exps.bank_map", "blk.1.ffn_down_exps.bank1.weight")
    assert is_bank_part(MAP) and is_bank_part(SECOND)
    for name in (STACK, "blk.1.ffn_down_exps.scale", "blk.1.ffn_down.bank0.weight", f"x{MAP}"):
        assert not is_bank_part(name)


def test_every_expert_is_where_it_was_written(whole: Path, tmp_path: Path) -> None:
    """Three banks of 6, 5 and 5 experts; bytes of each expert against the whole stack's."""
    banked(whole, tmp_path / "banked.gguf", (None, Q8_0, None))
    file, before = read_gguf(tmp_path / "banked.gguf"), read_gguf(whole)
    banks = read_banks(file)
    names = {f"blk.{bid}.ffn_{kind}_exps.weight" for bid in (1, 3) for kind in ("gate_up", "down")}
    assert set(banks) == names
    for name, stack in banks.items():
        assert stack.shape == before.tensors[name].shape
        assert [bank.shape[0] for bank in stack.banks] == [6, 5, 5]
        assert stack.qtypes == ("F32", "Q8_0", "F32") * 5 + ("F32",)
        experts = np.split(before.read(name), 16)
        for expert, whole_bytes in enumerate(experts):
            bank, index = stack.place(expert)
            data = np.split(file.read(bank.name), bank.shape[0])[index]
            expected = whole_bytes
            if expert % 3 == 1:
                values = whole_bytes.view(np.float32).reshape(stack.shape[1:])
                expected = gguf.quantize(values, Q8_0).ravel()
            np.testing.assert_array_equal(data, expected)


def test_a_file_without_banks_has_none(whole: Path) -> None:
    assert read_banks(read_gguf(whole)) == {}


def _edit(
    name: str, change: Callable[[np.ndarray], Any], becomes: Any = None
) -> Callable[[Tensors], None]:
    def changed(tensors: Tensors) -> None:
        values, qtype = tensors[name]
        values = values.copy()
        made = change(values)
        tensors[name] = (values if made is None else made, qtype if becomes is None else becomes)

    return changed


def _put(bank: int, expert: int, index: int) -> Callable[[Tensors], None]:
    def change(table: np.ndarray) -> None:
        table[bank, expert] = index

    return _edit(MAP, change)


def _drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(name) and None


DAMAGE: dict[str, tuple[Callable[[Tensors], None], list[str]]] = {
    "out of range": (_put(0, 2, 8), [f"{MAP}: expert 2 is matrix 8 of bank 0, which has 8"]),
    "below -1": (_put(1, 2, -2), [f"{MAP}: expert 2 is matrix -2 of bank 1, which has 8"]),
    "in no bank": (_put(0, 4, -1), [f"{MAP}: expert 4 is in 0 banks"]),
    "in two banks": (
        _put(1, 4, 0),
        [f"{MAP}: expert 4 is in 2 banks", f"{MAP}: several experts are matrix 0 of bank 1"],
    ),
    "two experts in one place": (
        _put(0, 0, 0),
        [f"{MAP}: several experts are matrix 0 of bank 0"],
    ),
    "a bank is missing": (_drop(SECOND), [f"{SECOND}: missing; the map has 2 banks"]),
    "a bank too many": (
        lambda tensors: tensors.update({bank_name(STACK, 2): tensors[SECOND]}),
        [f"{bank_name(STACK, 2)}: the map has 2 banks", "all banks hold 24 experts, the map 16"],
    ),
    "no map": (_drop(MAP), [f"{MAP}: missing"]),
    "a map of floats": (
        lambda tensors: tensors.update({MAP: (np.zeros((2, 16), np.float32), None)}),
        [rf"{MAP}: F32 \[2, 16\], expected I32"],
    ),
    "a flat map": (
        _edit(MAP, np.ravel),
        [rf"{MAP}: I32 \[32\], expected I32"],
    ),
    "nine banks": (
        _edit(MAP, lambda table: np.repeat(table, 9, axis=0)[:9]),
        [f"{MAP}: 9 banks; it can be 1 to 8"],
    ),
    "experts of the map": (
        _edit(MAP, lambda table: table[:, :12]),
        ["all banks hold 16 experts, the map 12"],
    ),
    "shapes": (
        _edit(FIRST, lambda values: values[:, :200]),
        [rf"{SECOND}: matrices of \[256, 96\], \[200, 96\] in {FIRST}"],
    ),
    "a bank of integers": (
        _edit(FIRST, lambda values: values.astype(np.int32), I32),
        [f"{FIRST}: I32, expected a float"],
    ),
    "an empty bank": (
        _edit(FIRST, lambda values: values[:0]),
        [rf"{FIRST}: shape \[0, 256, 96\], expected"],
    ),
    "a flat bank": (_edit(FIRST, lambda values: values[0]), [rf"{FIRST}: shape \[256, 96\]"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(whole: Path, tmp_path: Path, case: str) -> None:
    change, messages = DAMAGE[case]
    path = tmp_path / "banked.gguf"
    banked(whole, path, change=change)
    for message in messages:
        with pytest.raises(GGUFError, match=message) as caught:
            read_banks(read_gguf(path))
        assert str(path) in str(caught.value)
        assert "ffn_gate_up" not in str(caught.value)


def test_a_stack_and_its_banks_are_refused(whole: Path, tmp_path: Path) -> None:
    banked(whole, tmp_path / "banked.gguf")
    stack = next(t for t in gguf.GGUFReader(whole).tensors if t.name == STACK)
    rewrite(tmp_path / "banked.gguf", tmp_path / "both.gguf",
            tensors={STACK: (stack.data, stack.tensor_type)})  # fmt: skip
    with pytest.raises(GGUFError, match=f"{STACK}: there as a whole and in banks"):
        read_banks(read_gguf(tmp_path / "both.gguf"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"version": 2}, r"gemma4\.expert_bank_version is 2; version 1 is read"),
        ({"version": None}, r"no key gemma4\.expert_bank_version"),
        ({"count": 3}, r"gemma4\.expert_bank_count is 3, but the most banks are 2"),
    ],
)
def test_keys_are_checked(whole: Path, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    banked(whole, tmp_path / "banked.gguf", **keys)
    with pytest.raises(GGUFError, match=message):
        read_banks(read_gguf(tmp_path / "banked.gguf"))


def test_a_version_without_banks_is_refused(whole: Path, tmp_path: Path) -> None:
    rewrite(whole, tmp_path / "none.gguf", keys={"gemma4.expert_bank_version": 1})
    with pytest.raises(GGUFError, match="no tensor is an expert bank"):
        read_banks(read_gguf(tmp_path / "none.gguf"))


def test_the_map_is_i32_as_gguf_writes_it(whole: Path, tmp_path: Path) -> None:
    banked(whole, tmp_path / "banked.gguf")
    table = next(t for t in gguf.GGUFReader(tmp_path / "banked.gguf").tensors if t.name == MAP)
    assert table.tensor_type == I32 and table.shape.tolist() == [16, 2]


def test_inspect_counts_the_same_parameters(whole: Path, tmp_path: Path) -> None:
    """Banks of the same type are the same experts; only the maps are added to the bytes."""
    banked(whole, tmp_path / "banked.gguf", (None, None))
    ours, before = inspect(str(tmp_path / "banked.gguf")), inspect(str(whole))
    assert ours.parameters == before.parameters
    assert ours.nbytes == before.nbytes + 4 * (2 * 16 * 4)


@pytest.mark.llama_cpp
def test_inspect_shows_a_damaged_file_and_says_so(whole: Path, tmp_path: Path) -> None:
    banked(whole, tmp_path / "banked.gguf", change=_put(0, 4, -1))
    result = run("inspect", tmp_path / "banked.gguf")
    assert result.exit_code == 1
    assert "bits per weight" in result.stdout
    assert f"{MAP}: expert 4 is in 0 banks" in result.stderr
    result = run("inspect", tmp_path / "banked.gguf", "--json")
    assert result.exit_code == 1
    assert "expert 4 is in 0 banks" in json.loads(result.stdout)["damage"]
    banked(whole, tmp_path / "right.gguf")
    result = run("inspect", tmp_path / "right.gguf", "--json")
    assert (result.exit_code, json.loads(result.stdout)["damage"]) == (0, "")


def test_stock_llama_cpp_refuses_banks(llama_cpp: LlamaCpp, whole: Path, tmp_path: Path) -> None:
    """Before it computes anything, and naming the tensor that it misses."""
    banked(whole, tmp_path / "banked.gguf", (None, None))
    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    arguments = ["-m", str(tmp_path / "banked.gguf"), "-f", str(text), "-c", "64", "-b", "64",
                 "-t", "1"]  # fmt: skip
    with pytest.raises(LlamaCppError, match=r"tensor 'blk\.1\.ffn_gate_exps\.weight' not found"):
        run_perplexity(llama_cpp, arguments, timeout=60)

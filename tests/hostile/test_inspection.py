"""GGUF files that parse and say strange things: `inspect` shows them or names what is wrong."""

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from moequant.errors import GGUFError, MoequantError, UsageError
from moequant.gguf_export.metadata import MetadataEntry
from moequant.gguf_export.writer import TensorToWrite, write_gguf
from moequant.gguf_file import is_gguf
from moequant.inspection import Inspection, inspect
from moequant.tables.inspection import inspection_tables

SHAPES = {"token_embd.weight": (8, 32), "blk.0.ffn_up_exps.weight": (4, 8, 32)}
NAN, INF = math.nan, math.inf


def entry(key: str, value: Any) -> MetadataEntry:
    """A key with the type that its Python value suggests."""
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.INT64,
             float: GGUFValueType.FLOAT64, str: GGUFValueType.STRING}  # fmt: skip
    if not isinstance(value, list):
        return MetadataEntry(key, value, kinds[type(value)])
    return MetadataEntry(key, value, GGUFValueType.ARRAY, kinds[type(value[0])])


def look(path: Path, values: dict[str, Any], shapes: Any = SHAPES) -> Inspection:
    """Inspect a file with these keys, and show the result in both ways."""
    keys = {"general.architecture": "qwen3moe", **values}
    tensors = [
        TensorToWrite(name, shape, "F32", 4 * math.prod(shape)) for name, shape in shapes.items()
    ]
    metadata = [entry(key, value) for key, value in keys.items()]
    write_gguf(path, "qwen3moe", metadata, tensors, lambda tensor: [bytes(tensor.nbytes)])
    return show(inspect(str(path)))


def show(found: Inspection) -> Inspection:
    console = Console(file=StringIO(), markup=False, width=100)
    for table in inspection_tables(found):
        console.print(table)
    json.dumps(found.to_json(), allow_nan=False)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("key", ["expert_count", "expert_used_count"])
@pytest.mark.parametrize("value", ["four", True, 4.0, -4, ["4", "4"], [4, -1]])
def test_a_count_that_is_none_is_named(path: Path, key: str, value: Any) -> None:
    with pytest.raises(GGUFError, match=rf"model\.gguf: qwen3moe\.{key} is .*, not a count"):
        look(path, {f"qwen3moe.{key}": value})


def test_counts_by_layer_are_summed_up_by_their_largest(path: Path) -> None:
    """As in architectures whose layers differ."""
    counts = {"qwen3moe.expert_count": [0, 4, 2], "qwen3moe.expert_used_count": [0, 1, 1]}
    parameters = look(path, counts).parameters
    assert parameters is not None
    assert (parameters.expert, parameters.active) == (1024, 256 + 256)


@pytest.mark.parametrize("value", [3, NAN, True, "e1", [1, 2], [0.5]])
def test_thin_experts_that_are_no_text_are_not_shown(path: Path, value: Any) -> None:
    assert look(path, {"moequant.experts.thin": value}).thin_experts == []


@pytest.mark.parametrize(
    ("layers", "shares"),
    [
        (3, [0.25] * 4),
        ("0", [0.25] * 4),
        ([0], 0.25),
        ([0], "text"),
        (["0"], [0.25] * 4),
        ([0], ["a", "b", "c", "d"]),
        ([0], [0.25] * 3),
        ([0], [NAN] * 4),
        ([0], [INF, 0.0, 0.0, 0.0]),
        ([0], [-9.0, 0.0, 0.0, 0.0]),
    ],
)
def test_routed_shares_that_are_none_are_not_shown(path: Path, layers: Any, shares: Any) -> None:
    keys = {"moequant.experts.layers": layers, "moequant.experts.routed_share": shares}
    assert look(path, {"qwen3moe.expert_count": 4, **keys}).routed_share == {}


def test_routed_shares_are_shown(path: Path) -> None:
    shares = [0.1, 0.2, 0.3, 0.4]
    keys = {"moequant.experts.layers": [7], "moequant.experts.routed_share": shares}
    assert look(path, {"qwen3moe.expert_count": 4, **keys}).routed_share == {7: shares}


def test_a_template_that_is_no_text(path: Path) -> None:
    assert look(path, {"tokenizer.chat_template": 5}).metadata["tokenizer.chat_template"] == 5


def test_a_file_without_tensors(path: Path) -> None:
    """Only the vocabulary, as llama.cpp's own tests have them."""
    found = look(path, {"tokenizer.ggml.tokens": ["a", "b"]}, shapes={})
    assert found.parameters is not None
    assert (found.parameters.total, found.nbytes, found.bpw) == (0, 0, 0.0)


def test_numbers_that_json_has_no_name_for(path: Path) -> None:
    shown = look(path, {"a": NAN, "b": [INF, 1.0], "c": -INF}).metadata
    assert (shown["a"], shown["b"], shown["c"]) == ("nan", ["inf", 1.0], "-inf")


@pytest.mark.parametrize("value", ["text", NAN])
def test_an_imatrix_whose_floor_is_none(path: Path, value: Any) -> None:
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_key_value("moequant.calibration.floor", value, entry("", value).type)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones((1, 4), np.float32))
    writer.add_tensor("blk.0.attn_q.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match="floor is .*, not a number"):
        inspect(str(path))


SCALARS = (
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 9),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
VALUES = st.one_of(*SCALARS, *(st.lists(scalar, min_size=1, max_size=20) for scalar in SCALARS))
KEYS = st.sampled_from(
    ["general.name", "general.type", "qwen3moe.expert_count", "qwen3moe.expert_used_count",
     "qwen3moe.block_count", "moequant.experts.thin", "moequant.experts.layers",
     "moequant.experts.routed_share", "moequant.calibration.floor", "tokenizer.chat_template",
     "tokenizer.ggml.tokens", "[bold"]
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(KEYS, VALUES), tensors=st.booleans())
@example(values={"general.type": "imatrix"}, tensors=True)
def test_any_metadata_is_shown_or_refused(
    path: Path, values: dict[str, Any], tensors: bool
) -> None:
    try:
        look(path, values, SHAPES if tensors else {})
    except MoequantError as error:
        assert str(path) in str(error)
        assert error.exit_code == 2


@pytest.mark.parametrize("source", ["./missing", "/nowhere/at/all", "missing.gguf", "a/b.gguf"])
def test_a_path_that_leads_nowhere(source: str) -> None:
    with pytest.raises(UsageError, match=f"^{source}: no such file or folder"):
        inspect(source)


def test_a_name_that_no_file_can_have() -> None:
    source = "x" * 5000 + ".gguf"
    with pytest.raises(UsageError, match="xxx.gguf: File name too long"):
        inspect(source)
    with pytest.raises(GGUFError, match="xxx.gguf: File name too long"):
        is_gguf(Path(source))


def test_a_file_that_may_not_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"GGUF")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(GGUFError, match=r"model\.gguf: Permission denied"):
        inspect(str(path))

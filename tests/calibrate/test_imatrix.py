"""Importance from sums, the file, and files that are damaged."""

import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from moequant.calibrate import Imatrix, MatrixStatistics
from moequant.errors import ExportError, ImatrixError

DOWN = "blk.3.ffn_down_exps.weight"


def floats(*values: object) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def expert_entry() -> MatrixStatistics:
    """Expert 0: 4 tokens of weight 2 in all; 1: 1 routed, 1 lent; 2: none at all."""
    return MatrixStatistics(
        in_sum2=floats([4, 8], [3, 3], [0, 0]),
        counts=floats(4, 1, 0),
        gate_in_sum2=floats([2, 6], [1, 1], [0, 0]),
        gate_counts=floats(2, 0.5, 0),
        near_miss_in_sum2=floats([0, 0], [1, 0], [0, 0]),
        near_miss_counts=floats(0, 1, 0),
        near_miss_gate_counts=floats(0, 0.5, 0),
    )


def imatrix(kappa: float = 2.0, floor: int = 2) -> Imatrix:
    dense = MatrixStatistics(in_sum2=floats([6, 9, 0]), counts=floats(3))
    keys = {"moequant.calibration.kappa": kappa, "moequant.calibration.floor": floor}
    entries = {"blk.3.attn_q.weight": dense, DOWN: expert_entry()}
    return Imatrix(entries, ["text"], 3, 512, {**keys, "moequant.version": "1"})


def test_importance_is_weighted_shrunk_and_pooled() -> None:
    """pool = ([2,6] + [1,1] + [1,0]) / (2 + 1) = [4/3, 7/3], of mean 1: [8/11, 14/11]; κ = 2.
    A routed token has g² = 2.5/5, as much as the lent one. Expert 0: n = 4, s = [1, 3], of mean
    2. Expert 1: n = 2, s = [2, 1] / 1, of mean 1.5. Expert 2: the pool."""
    pool = np.array([8 / 11, 14 / 11])
    expected = [
        2 * (4 * np.array([0.5, 1.5]) + 2 * pool) / 6,
        1.5 * (2 * np.array([4 / 3, 2 / 3]) + 2 * pool) / 4,
        pool * 11 / 6,
    ]
    found = imatrix().importance(DOWN, 3, 2)
    assert found is not None and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_shrinkage_does_not_depend_on_the_size_of_rows() -> None:
    """Expert 1 with activations ten thousand times as large is the pool, of mean 1 [4/3, 2/3];
    expert 0 with its 4 tokens of [0.5, 1.5] is moved by κ = 2 as by any other pool."""
    entry = expert_entry()
    factors = floats([1], [1e8], [1])
    changed = {name: vars(entry)[name] * factors for name in ("gate_in_sum2", "near_miss_in_sum2")}
    large = replace(imatrix(), entries={DOWN: replace(entry, **changed)})
    rows = large.importance(DOWN, 3, 2)
    assert rows is not None
    shape = rows / rows.mean(1, keepdims=True)
    moved = (4 * np.array([0.5, 1.5]) + 2 * np.array([4 / 3, 2 / 3])) / 6
    np.testing.assert_allclose(shape, [moved, [4 / 3, 2 / 3], [4 / 3, 2 / 3]], rtol=1e-5)


def test_a_faint_near_miss_is_no_full_token() -> None:
    entry = replace(expert_entry(), near_miss_gate_counts=floats(0, 0.005, 0))
    np.testing.assert_allclose(entry.effective_tokens(), [4, 1.01, 0], rtol=1e-6)
    np.testing.assert_array_equal(entry.tokens(), [4, 2, 0])


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 1e38])
def test_importance_is_finite_whatever_the_sums(size: float) -> None:
    """Sums and counts at both ends of float32, of a routed and of a lent token."""
    values = floats([size, 0], [size, size], [0, 0])
    for counts in (floats(1e-44, 1, 0), floats(1, 1e38, 0)):
        lent = (values[::-1], floats(0, 0, 1), floats(0, 0, 1e-44))
        entry = MatrixStatistics(values, counts, values, counts, *lent)
        keys = {"moequant.calibration.kappa": 32.0}
        found = Imatrix({DOWN: entry}, metadata=keys).importance(DOWN, 3, 2)
        assert found is not None
        assert np.isfinite(found).all() and (found >= 0).all() and (found.sum(1) > 0).all()


@pytest.mark.parametrize(("sums", "count"), [(0, 0), (0, 5), (3, 0)])
def test_what_saw_nothing_at_all_counts_as_missing(sums: float, count: float) -> None:
    empty = MatrixStatistics(floats([sums] * 3), floats(count))
    found = imatrix()
    found.entries["blk.1.attn_q.weight"] = empty
    assert found.importance("blk.1.attn_q.weight", 1, 3) is None
    wanted = [("blk.1.attn_q.weight", 1, 3), (DOWN, 3, 2)]
    assert found.check(wanted) == ("blk.1.attn_q.weight",)


def test_without_kappa_only_the_unseen_expert_gets_the_pool() -> None:
    found = imatrix(kappa=0.0).importance(DOWN, 3, 2)
    np.testing.assert_allclose(found, [[1, 3], [2, 1], [4 / 3, 7 / 3]], rtol=1e-6)


def test_files_of_llama_imatrix_give_plain_means() -> None:
    """No moequant keys, no gates; 0 tokens: the pool, never ones. One count may serve all."""
    plain = MatrixStatistics(in_sum2=floats([4, 8], [3, 3], [0, 0]), counts=floats(4, 1, 0))
    shared = MatrixStatistics(in_sum2=floats([4, 8, 2, 2]), counts=floats(2))
    theirs = Imatrix({DOWN: plain, "blk.0.attn_k_b.weight": shared})
    found = theirs.importance(DOWN, 3, 2)
    np.testing.assert_allclose(found, [[1, 2], [3, 3], [7 / 5, 11 / 5]], rtol=1e-6)
    found = theirs.importance("blk.0.attn_k_b.weight", 2, 2)
    np.testing.assert_allclose(found, [[2, 4], [1, 1]])


def test_a_tensor_without_entry_has_no_importance() -> None:
    assert imatrix().importance("blk.0.attn_q.weight", 1, 3) is None


def test_check_lists_every_misfit_and_returns_what_is_missing() -> None:
    wanted = [("blk.3.attn_q.weight", 1, 3), (DOWN, 3, 2), ("blk.9.attn_k.weight", 1, 3)]
    assert imatrix().check(wanted) == ("blk.9.attn_k.weight",)
    with pytest.raises(ImatrixError, match=r"(?s)attn_q.*1 x 4 columns.*ffn_down_exps.*4 x 2"):
        imatrix().check([("blk.3.attn_q.weight", 1, 4), (DOWN, 4, 2)])
    with pytest.raises(ImatrixError, match="nothing for this model"):
        imatrix().check([("blk.3.other.weight", 1, 3)])
    with pytest.raises(ImatrixError, match="another model"):
        imatrix().importance(DOWN, 3, 3)


def test_thin_experts_are_reported_with_their_numbers() -> None:
    lent, thin = imatrix().thin_experts()  # what was lent makes an expert no less thin
    assert (lent.layer, lent.expert, lent.tokens, lent.near_miss, lent.floor) == (3, 1, 1, 1, 2)
    assert (thin.layer, thin.expert, thin.tokens, thin.near_miss, thin.floor) == (3, 2, 0, 0, 2)
    assert str(lent) == (
        "layer 3, expert 1: routed tokens 1 of 2 wanted, 20.000% of the layer's; "
        "near misses lent: 1"
    )
    assert imatrix().routed_share() == {3: [0.8, pytest.approx(0.2), 0.0]}
    assert [thin.expert for thin in imatrix(floor=5).thin_experts()] == [0, 1, 2]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    imatrix().write(path)
    found = Imatrix.read(path)
    assert (found.datasets, found.chunk_count, found.chunk_size) == (["text"], 3, 512)
    assert found.metadata == imatrix().metadata
    assert found.entries.keys() == imatrix().entries.keys()
    for name, entry in imatrix().entries.items():
        for part, values in vars(entry).items():
            np.testing.assert_array_equal(getattr(found.entries[name], part), values)
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kappa", float("nan")),
        ("kappa", float("inf")),
        ("kappa", -1.0),
        ("kappa", "32"),
        ("kappa", True),
        ("floor", -1),
        ("floor", 2.5),
        ("floor", "256"),
        ("floor", [1]),
    ],
)
def test_damaged_settings_are_named(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ImatrixError, match=rf"bad\.gguf: moequant\.calibration\.{key} is "):
        Imatrix.read(damaged(tmp_path, keys={f"moequant.calibration.{key}": value}))


def test_settings_of_unknown_types_are_left_out(tmp_path: Path) -> None:
    odd = {"a": [1, 2], "b": True, "c": -1, "d": float("nan"), "e": 1 << 63}
    good = {"moequant.calibration.seed": 3, "moequant.version": "1", "moequant.share": 0.5}
    path = damaged(tmp_path, keys={f"moequant.calibration.{k}": v for k, v in odd.items()} | good)
    found = Imatrix.read(path)
    assert found.metadata == good
    found.write(tmp_path / "again.gguf")
    assert Imatrix.read(tmp_path / "again.gguf").metadata == good


def test_the_layout_is_llama_imatrix_s(tmp_path: Path) -> None:
    """ne {columns, matrices} and {1, matrices}, names sorted, no architecture."""
    imatrix().write(tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes[f"{DOWN}.in_sum2"] == [2, 3] and shapes[f"{DOWN}.counts"] == [1, 3]
    assert shapes["blk.3.attn_q.weight.in_sum2"] == [3, 1]
    assert shapes["blk.3.attn_q.weight.counts"] == [1, 1]
    assert "general.architecture" not in reader.fields
    assert reader.fields["general.type"].contents() == "imatrix"
    assert {len(name) < 64 for name in shapes} == {True}


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_text("before")
    broken = imatrix()
    broken.metadata["moequant.odd"] = object()
    with pytest.raises(TypeError, match="odd"):
        broken.write(path)
    assert [path] == list(tmp_path.iterdir()) and path.read_text() == "before"
    with pytest.raises(ExportError, match="was not written"):
        imatrix().write(tmp_path / "missing" / "a.gguf")


def damaged(tmp_path: Path, keys: Mapping[str, object] | None = None, **parts: np.ndarray) -> Path:
    """A file with one entry whose parts are replaced, and further keys."""
    whole = {"in_sum2": floats([1, 2], [3, 4]), "counts": floats([1], [1])}
    writer = gguf.GGUFWriter(tmp_path / "bad.gguf", "none")
    writer.add_type("imatrix")
    for key, setting in (keys or {}).items():
        kind = gguf.GGUFValueType.get_type(setting)
        large = kind == gguf.GGUFValueType.INT32 and setting >= 1 << 31
        writer.add_key_value(key, setting, gguf.GGUFValueType.UINT64 if large else kind)
    for part, values in (whole | parts).items():
        if values.size:
            writer.add_tensor(f"blk.0.x.weight.{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "bad.gguf"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"in_sum2": floats([1, np.nan], [3, 4])}, "1 of 4 values are negative or not finite"),
        ({"in_sum2": floats([1, np.inf], [-3, 4])}, "2 of 4 values"),
        ({"counts": floats([1], [-1])}, "counts: 1 of 2 values"),
        ({"counts": floats([1], [1], [1])}, "4 sums do not divide into 3"),
        ({"counts": floats()}, "has in_sum2 only"),
        ({"counts": np.ones((2, 1), np.float16)}, "counts is F16"),
        ({"gate_in_sum2": floats([1, 2])}, "gate_in_sum2 has 2 values, 4 are expected"),
    ],
)
def test_damaged_statistics_are_named(
    tmp_path: Path, parts: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(ImatrixError, match=message):
        Imatrix.read(damaged(tmp_path, **parts))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(ImatrixError, match="No such file"):
        Imatrix.read(path)
    path.write_bytes(struct.pack("<i", 1) + b"old imatrix.dat")
    with pytest.raises(ImatrixError, match=r"old \.dat format"):
        Imatrix.read(path)
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ImatrixError, match="not 'imatrix'"):
        Imatrix.read(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    imatrix().write(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    last = len(data.rstrip(b"\0"))  # what follows is padding
    for length in [*range(0, last, 37), last - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ImatrixError):
            Imatrix.read(cut)

"""A whole calibration: text in, statistics out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moequant.calibrate import CalibrationOptions, Imatrix, calibrate
from moequant.calibrate.forward import StreamedModel
from moequant.calibrate.observe import LayerObserver, observable
from moequant.calibrate.run import observe_model
from moequant.checkpoint import Checkpoint
from moequant.errors import CalibrationError, UsageError
from tests.calibrate.models import ONE_LINE, described, windows
from tests.checkpoints import KINDS


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(ONE_LINE)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_of_the_layers_is_observed(kind: str, text: Path) -> None:
    checkpoint, spec = described(kind)
    options = CalibrationOptions(texts=(text,), tokens=128, sequence_length=64, floor=8)
    imatrix = calibrate(checkpoint, spec, options)
    wanted = [(t.name, t.n_matrices, t.shape[-1]) for t in spec.tensors if observable(t)]
    reused = [n for n, _, _ in wanted if n not in imatrix.entries]
    assert imatrix.check(wanted) == tuple(reused)
    assert all(".attn_k" in name or ".attn_v" in name for name in reused)
    for name, n_matrices, columns in wanted:
        importance = imatrix.importance(name, n_matrices, columns)
        assert importance is not None or name in reused
        if importance is not None:
            assert np.isfinite(importance).all() and (importance.sum(1) > 0).all()
    layers = [set(), set(spec.moe_layers)][bool(spec.expert_count)]
    assert set(imatrix.routed_share()) == layers
    for share in imatrix.routed_share().values():
        assert sum(share) == pytest.approx(1)


def test_starved_experts_reach_the_floor_by_near_misses() -> None:
    """96 tokens, 4 of 16 experts each: 24 on average. Plain sums are the same without lending."""
    model = StreamedModel(*described("qwen3-moe"))
    ids = windows(1)
    plain = observe_model(model, ids, CalibrationOptions(floor=0))
    lent = observe_model(model, ids, CalibrationOptions(floor=30))
    for name, entry in lent.items():
        np.testing.assert_array_equal(entry.counts, plain[name].counts)
        np.testing.assert_array_equal(entry.in_sum2, plain[name].in_sum2)
        if entry.near_miss_counts is None:
            continue
        assert plain[name].near_miss_counts is None
        starved = entry.counts < 30
        assert starved.any() and not starved.all()
        np.testing.assert_array_equal(entry.tokens(), np.maximum(entry.counts, 30))
        assert (entry.near_miss_in_sum2[starved].sum(1) > 0).all()
        assert (entry.near_miss_in_sum2[~starved] == 0).all()


def test_too_high_a_floor_leaves_every_expert_thin(text: Path) -> None:
    checkpoint, spec = described("gemma4-additive-some-layers")
    options = CalibrationOptions(texts=(text,), tokens=64, sequence_length=64, floor=65)
    imatrix = calibrate(checkpoint, spec, options)
    thin = imatrix.thin_experts()
    assert {report.layer for report in thin} == {1, 3} and len(thin) == 2 * 16
    assert {report.tokens + report.near_miss for report in thin} == {64}


def test_batches_and_lent_memory_change_no_result() -> None:
    model = StreamedModel(*described("gemma4-additive"))
    one = observe_model(model, windows(), CalibrationOptions(batch_tokens=1))
    all_at_once = observe_model(model, windows(), CalibrationOptions())
    for name, entry in one.items():
        other = all_at_once[name]
        np.testing.assert_allclose(entry.in_sum2, other.in_sum2, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(entry.counts, other.counts)


def test_the_file_tells_what_made_it(text: Path, tmp_path: Path) -> None:
    checkpoint, spec = described("gemma4-moe")
    stages: list[tuple[str, int, int]] = []
    options = CalibrationOptions(texts=(text,), tokens=100, sequence_length=32, seed=3)
    calibrate(checkpoint, spec, options, lambda *stage: stages.append(stage)).write(
        tmp_path / "a.imatrix.gguf"
    )
    assert stages == [("calibrate", n, 4) for n in (1, 2, 3, 4)]
    found = Imatrix.read(tmp_path / "a.imatrix.gguf")
    assert (found.chunk_count, found.chunk_size, found.datasets) == (3, 32, [str(text)])
    keys = {name.rpartition(".")[2]: value for name, value in found.metadata.items()}
    assert keys["tokens"] == 96 and keys["seed"] == 3 and keys["compute_dtype"] == "float32"
    assert keys["digest"] == checkpoint.digest() and keys["floor"] == 256
    assert len(keys["corpus_sha256"]) == 64 and found.kappa == 32


def test_the_output_matrix_on_request(text: Path) -> None:
    for kind, name in (("qwen3-dense", "output.weight"), ("gemma4-dense", "token_embd.weight")):
        options = CalibrationOptions(
            texts=(text,), tokens=32, sequence_length=32, process_output=True
        )
        entry = calibrate(*described(kind), options).entries[name]
        assert entry.counts.tolist() == [32] and entry.in_sum2.shape == (1, 256)


def test_activations_that_overflow_are_an_error() -> None:
    """float16 ends at 65504; weights a thousand times as large go beyond."""
    checkpoint, spec = described("qwen3-dense")

    class Source:
        tensors = checkpoint.tensors

        def read(self, name: str) -> torch.Tensor:
            return checkpoint.read(name) * (1e4 if "layers.2.mlp" in name else 1)

    model = StreamedModel(Source(), spec, dtype=torch.float16)
    with pytest.raises(CalibrationError, match=r"layer 2: .* not finite in torch\.float16"):
        observe_model(model, windows(1, 16), CalibrationOptions())


class Altered:
    """The tensors of a checkpoint, with `change(name, tensor)` in the place of each."""

    def __init__(
        self, checkpoint: Checkpoint, change: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> None:
        self.tensors = checkpoint.tensors
        self._read, self._change = checkpoint.read, change

    def read(self, name: str) -> torch.Tensor:
        return self._change(name, self._read(name))


def overflowing(expert: int) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """An expert of layer 1 whose inner values have squares beyond float32, with a tiny down."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if f"layers.1.mlp.experts.{expert}." not in name:
            return tensor
        return tensor * (1e-20 if "down_proj" in name else 1e12)

    return change


def test_an_expert_that_overflows_on_lent_tokens_is_thin_and_no_more(tmp_path: Path) -> None:
    """Expert 15 of layer 1 has the score 0, of the others half have more: it is never chosen."""
    checkpoint, spec = described("qwen3-moe")
    overflow = overflowing(15)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("layers.1.mlp.gate.weight"):
            half = tensor[:7]
            return torch.cat([half, -half, tensor[14:15], 0 * tensor[15:]])
        return overflow(name, tensor)

    model = StreamedModel(Altered(checkpoint, change), spec)
    entries = observe_model(model, windows(1), CalibrationOptions(floor=30))
    assert entries["blk.1.ffn_down_exps.weight"].counts[15] == 0
    keys = {"moequant.calibration.kappa": 32.0, "moequant.calibration.floor": 30}
    imatrix = Imatrix(entries, metadata=keys)
    for tensor in spec.tensors:
        if tensor.name in entries:
            found = imatrix.importance(tensor.name, tensor.n_matrices, tensor.shape[-1])
            assert found is not None and np.isfinite(found).all() and (found >= 0).all()
    thin = {r.expert: r.near_miss for r in imatrix.thin_experts() if r.layer == 1}
    assert thin[15] == 0
    assert all(near_miss > 0 for expert, near_miss in thin.items() if expert != 15)
    imatrix.write(tmp_path / "a.gguf")
    assert Imatrix.read(tmp_path / "a.gguf").entries.keys() == entries.keys()


def test_routed_tokens_that_overflow_name_tensor_and_expert() -> None:
    checkpoint, spec = described("qwen3-moe")
    model = StreamedModel(Altered(checkpoint, overflowing(5)), spec)
    with pytest.raises(CalibrationError, match=r"blk\.1\.ffn_down_exps\.weight, expert 5: "):
        observe_model(model, windows(1), CalibrationOptions())


def test_nothing_is_kept_after_a_layer_and_nothing_lent_above_the_floor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A floor of 1 that all experts meet: the near-miss pass does not begin."""
    observers: list[LayerObserver] = []
    close = LayerObserver.close

    def noted(self: LayerObserver) -> None:
        assert self._scores and self._observer._inputs
        close(self)
        observers.append(self)

    def never(*_: object) -> None:
        raise AssertionError("no expert is below the floor")

    monkeypatch.setattr(LayerObserver, "close", noted)
    monkeypatch.setattr("moequant.calibrate.observe.near_misses", never)
    observe_model(StreamedModel(*described("qwen3-moe")), windows(), CalibrationOptions(floor=1))
    assert len(observers) == 4
    for observer in observers:
        kept = observer._observer
        assert not (observer._scores or kept._inputs or kept._chosen or kept._gates)


def test_a_tokenizer_of_another_model_is_noticed(text: Path) -> None:
    checkpoint, spec = described("gemma4-dense")
    small = type(spec)(**{**vars(spec), "vocab_size": 300})
    with pytest.raises(CalibrationError, match="300 rows"):
        calibrate(checkpoint, small, CalibrationOptions(texts=(text,), sequence_length=32))


def test_text_shorter_than_a_sequence_is_an_error(text: Path) -> None:
    options = CalibrationOptions(texts=(text,), sequence_length=4096)
    with pytest.raises(CalibrationError, match="a window needs 4096"):
        calibrate(*described("gemma4-dense"), options)


def test_options_out_of_range_are_all_named() -> None:
    with pytest.raises(UsageError, match=r"(?s)sequence length = 1.*floor = -1.*'float8'"):
        CalibrationOptions(sequence_length=1, floor=-1, compute_dtype="float8")
    with pytest.raises(UsageError, match="calibration tokens = 100, at least 512"):
        CalibrationOptions(tokens=100)
    with pytest.raises(UsageError, match="kappa = nan"):
        CalibrationOptions(kappa=float("nan"))
    with pytest.raises(UsageError, match="kappa = inf"):
        CalibrationOptions(kappa=float("inf"))
    for seed in (-1, 1 << 63):
        with pytest.raises(UsageError, match=f"seed = {seed}"):
            CalibrationOptions(seed=seed)

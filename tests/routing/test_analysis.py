"""Routing and its ablation against transformers' ordinary forward, watched by hooks."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moequant.architectures import describe
from moequant.calibrate.forward import StreamedModel
from moequant.checkpoint import open_checkpoint
from moequant.errors import ArchitectureError, CalibrationError
from moequant.routing.analysis import RoutingAnalysis, analyse_routing, text_windows
from moequant.routing.options import RoutingOptions
from tests.calibrate.models import ONE_LINE, reference
from tests.routing.routed import SHARED_KV, Seen, losses, make, with_top_k, without_experts

KINDS = ["gemma4-additive-some-layers", "gemma4-moe", SHARED_KV, "qwen3-moe"]
LENGTH = 80  # longer than the sliding windows


@dataclass
class Case:
    """A kind's analysis, and what transformers' ordinary forward of the same tokens gives."""

    kind: str
    folder: Path
    options: RoutingOptions
    analysis: RoutingAnalysis
    windows: dict[str, torch.Tensor]
    model: Any
    loaded: list[int]
    seen: dict[int, Seen]

    @property
    def ids(self) -> torch.Tensor:
        return torch.cat(list(self.windows.values()))


@contextmanager
def noted_loads(loaded: list[int]) -> Iterator[None]:
    """Every layer that is loaded, by its number."""
    plain = StreamedModel.layer
    with pytest.MonkeyPatch.context() as patch:

        def layer(self: StreamedModel, bid: int) -> Any:
            loaded.append(bid)
            return plain(self, bid)

        patch.setattr(StreamedModel, "layer", layer)
        yield


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Three sequences of prose and two of numbers, in batches of two."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    checkpoint = open_checkpoint(str(make(kind, folder / "model")))
    prose, numbers = folder / "prose.txt", folder / "numbers.txt"
    prose.write_text(ONE_LINE * 3)
    numbers.write_text(" ".join(str(n * n * 37) for n in range(200)))
    options = RoutingOptions(
        texts=(("prose", prose), ("numbers", numbers)),
        tokens=3 * LENGTH,
        sequence_length=LENGTH,
        batch_tokens=2 * LENGTH,
    )
    spec, loaded = describe(checkpoint), list[int]()
    with noted_loads(loaded):
        analysis = analyse_routing(checkpoint, spec, options)
    windows = text_windows(checkpoint.path, spec, options)
    model = reference(kind, checkpoint.path)
    seen = {bid: Seen(model.model.layers[bid]) for bid in spec.moe_layers}
    with torch.no_grad():
        model(input_ids=torch.cat(list(windows.values())))
    return Case(kind, checkpoint.path, options, analysis, windows, model, loaded, seen)


def test_each_layer_is_loaded_once_for_all_variants(case: Case) -> None:
    assert case.loaded == [0, 1, 2, 3]
    assert [layer.layer for layer in case.analysis.layers] == list(case.seen)
    assert case.analysis.texts == {name: part.numel() for name, part in case.windows.items()}


def test_shares_are_of_what_the_experts_are_given(case: Case) -> None:
    assert case.ids.shape[0] > 3  # of two texts
    for layer in case.analysis.layers:
        seen = case.seen[layer.layer]
        counts = torch.bincount(seen.chosen.flatten(), minlength=16).double()
        assert counts.std() > 5  # or any layer would do
        torch.testing.assert_close(layer.share, counts / counts.sum(), rtol=0, atol=0)
        mass = torch.zeros(16, dtype=torch.float64)
        mass.index_add_(0, seen.chosen.flatten(), seen.gates.flatten().double())
        torch.testing.assert_close(layer.gate_share, mass / mass.sum(), rtol=1e-4, atol=1e-5)
        prose = case.windows["prose"].numel()
        for name, part in (("prose", seen.chosen[:prose]), ("numbers", seen.chosen[prose:])):
            of_text = torch.bincount(part.flatten(), minlength=16) / part.numel()
            torch.testing.assert_close(layer.domains.domain_share[name].float(), of_text)


def test_evenness_of_the_shares(case: Case) -> None:
    """By other formulas: Gini from all pairs, entropy by NumPy."""
    for layer in case.analysis.layers:
        share = layer.share.numpy()
        pairs = np.abs(share[:, None] - share[None]).sum() / (2 * 16)
        assert layer.gini == pytest.approx(pairs)
        used = share[share > 0]
        assert layer.entropy == pytest.approx(-(used * np.log(used)).sum() / math.log(16))
        assert layer.dead == np.flatnonzero(share == 0).tolist()


def test_confidence_is_of_the_router_s_probabilities(case: Case) -> None:
    for layer in case.analysis.layers:
        p = case.seen[layer.layer].logits.softmax(-1)
        top = p.sort(-1, descending=True).values
        entropy = torch.distributions.Categorical(probs=p).entropy() / math.log(16)
        found = layer.confidence
        assert found.top1 == pytest.approx(float(top[:, 0].mean()), rel=1e-4)
        assert found.chosen_mass == pytest.approx(float(top[:, :4].sum(-1).mean()), rel=1e-4)
        assert found.entropy == pytest.approx(float(entropy.mean()), rel=1e-4)


def test_cosines_are_of_the_checkpoint_s_weights(case: Case) -> None:
    state = case.model.state_dict()
    for layer in case.analysis.layers:
        names = [n for n in state if f"layers.{layer.layer}." in n and ".experts." in n]
        assert len(names) == 2
        rows = np.concatenate([state[n].flatten(1).double().numpy() for n in sorted(names)], axis=1)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        cosines = (rows @ rows.T)[np.triu_indices(16, 1)]
        assert layer.cosine is not None
        assert layer.cosine.mean == pytest.approx(cosines.mean(), abs=1e-6)
        assert layer.cosine.max == pytest.approx(cosines.max(), abs=1e-6)
        i, j = layer.cosine.pair
        assert float(rows[i] @ rows[j]) == pytest.approx(cosines.max(), abs=1e-6)


def test_branches_are_measured_where_they_are_added(case: Case) -> None:
    for layer in case.analysis.layers:
        seen = case.seen[layer.layer]
        if case.kind == "qwen3-moe":
            assert layer.branch is None
            continue
        assert layer.branch is not None
        experts, dense = (float(h.square().mean().sqrt()) for h in (seen.experts, seen.dense))
        assert layer.branch.experts_rms == pytest.approx(experts, rel=1e-4)
        assert layer.branch.dense_rms == pytest.approx(dense, rel=1e-4)
        assert layer.branch.ratio == pytest.approx(experts / dense, rel=1e-4)
        cosine = torch.cosine_similarity(seen.experts, seen.dense, dim=-1).mean()
        assert layer.branch.cosine == pytest.approx(float(cosine), abs=1e-4)


def test_perplexities_are_those_of_models_with_fewer_experts(case: Case, tmp_path: Path) -> None:
    """Of top-j, config.json says j; of off, the experts' down projections are zeros."""
    assert case.analysis.ablation is not None
    whole = losses(case.model, case.ids)
    names = [one.name for one in case.analysis.ablation]
    tops = ["top-1", "top-2", "top-3", "top-4"]
    assert names == (tops if case.kind == "qwen3-moe" else ["off", *tops])
    for one in case.analysis.ablation:
        if one.experts == 0:
            model = without_experts(case.model)
        else:
            kind = "gemma4-additive" if case.kind == SHARED_KV else case.kind
            model = with_top_k(kind, case.folder, one.experts, tmp_path / one.name)
        expected = losses(model, case.ids)
        ppl = math.exp(float(expected.mean()))
        assert one.perplexity.value == pytest.approx(ppl, rel=1e-5)
        numbers = [len(part) for part in case.windows.values()]
        difference = expected - whole
        assert one.delta_nll.value == pytest.approx(float(difference.mean()), abs=1e-5)
        assert one.delta_nll.stderr == pytest.approx(error(difference, numbers), rel=1e-3, abs=1e-6)
        assert one.experts == 4 or one.delta_nll.stderr > 1e-3  # a variant that is no other
        assert one.perplexity.stderr == pytest.approx(ppl * error(expected, numbers), rel=1e-3)
        parts = expected.split([len(part) for part in case.windows.values()])
        for text, part in zip(case.windows, parts, strict=True):
            assert one.by_text[text] == pytest.approx(math.exp(float(part.mean())), rel=1e-5)


def error(values: torch.Tensor, numbers: list[int]) -> float:
    """Of the mean of (windows, scored), with so many windows of each text; by NumPy."""
    means = np.split(values.mean(1).numpy(), np.cumsum(numbers)[:-1])
    assert min(numbers) > 1
    squares = [len(part) * part.var(ddof=1) for part in means]
    return math.sqrt(sum(squares)) / len(values)


def test_bytes_are_those_of_the_checkpoint(case: Case) -> None:
    state = case.model.state_dict()
    experts = [t for n, t in state.items() if ".experts." in n or n.endswith("per_expert_scale")]
    assert case.analysis.expert_bytes == sum(4 * t.numel() for t in experts)
    files = sum(file.stat().st_size for file in case.folder.glob("*.safetensors"))
    assert 0.98 * files < case.analysis.total_bytes < files


# --- experts that nobody reaches ---------------------------------------------------------------


def edited(folder: Path, copied: Path, ending: str, edit: Any) -> Path:
    """A copy of a checkpoint in which `edit` changed the tensors whose names end with `ending`."""
    shutil.copytree(folder, copied)
    changed = 0
    for file in copied.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith(ending):
                edit(tensors[name])
                changed += 1
        save_file(tensors, file, metadata={"format": "pt"})
    assert changed == 4
    return copied


def test_an_expert_that_the_router_cannot_choose_is_dead(tmp_path: Path) -> None:
    """Rows in pairs of w and -w: of each pair one scores above 0, and 7 pairs fill four places;
    the zero rows of the last two experts never do."""

    def pair(weight: torch.Tensor) -> None:
        weight[1:14:2] = -weight[0:14:2]
        weight[14:] = 0

    folder = edited(make("qwen3-moe", tmp_path / "a"), tmp_path / "b", "mlp.gate.weight", pair)
    checkpoint, text = open_checkpoint(str(folder)), tmp_path / "text.txt"
    text.write_text(ONE_LINE)
    options = RoutingOptions((("text", text),), 256, 64, ablation=False)
    analysis = analyse_routing(checkpoint, describe(checkpoint), options)
    assert analysis.ablation is None
    assert [layer.dead for layer in analysis.layers] == [[14, 15]] * 4
    assert all(float(layer.gate_share[14:].sum()) == 0 for layer in analysis.layers)


def test_experts_that_put_out_nothing_are_told(tmp_path: Path) -> None:
    """All experts zeros: no branch, and perplexity is the same with and without."""
    folder = edited(
        make("gemma4-additive", tmp_path / "a"), tmp_path / "b", "experts.down_proj",
        lambda weight: weight.zero_(),
    )  # fmt: skip
    checkpoint, text = open_checkpoint(str(folder)), tmp_path / "text.txt"
    text.write_text(ONE_LINE)
    options = RoutingOptions((("text", text),), 128, 64, tops=(1,))
    analysis = analyse_routing(checkpoint, describe(checkpoint), options)
    assert analysis.ablation is not None
    assert [one.name for one in analysis.ablation] == ["off", "top-1", "top-4"]
    assert {one.delta_nll.value for one in analysis.ablation} == {0.0}
    assert [layer.branch and layer.branch.ratio for layer in analysis.layers] == [0.0] * 4


def test_gates_below_zero_weigh_by_their_size(tmp_path: Path) -> None:
    """Half of the experts' scales turned: with sums of both signs shares could be anything."""

    def turn(scale: torch.Tensor) -> None:
        scale[::2] *= -1

    folder = edited(make("gemma4-moe", tmp_path / "a"), tmp_path / "b", "per_expert_scale", turn)
    checkpoint, text = open_checkpoint(str(folder)), tmp_path / "text.txt"
    text.write_text(ONE_LINE)
    options = RoutingOptions((("text", text),), 256, 64, ablation=False)
    spec = describe(checkpoint)
    analysis = analyse_routing(checkpoint, spec, options)
    model = reference("gemma4-moe", folder)
    seen = [Seen(layer) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=text_windows(folder, spec, options)["text"])
    for layer, of_layer in zip(analysis.layers, seen, strict=True):
        chosen, gates = of_layer.chosen.flatten(), of_layer.gates.flatten().double()
        assert (gates < 0).any() and (gates > 0).any()
        mass = torch.zeros(16, dtype=torch.float64).index_add_(0, chosen, gates.abs())
        torch.testing.assert_close(layer.gate_share, mass / mass.sum(), rtol=1e-4, atol=1e-5)


# --- refusals and notes ----------------------------------------------------------------------


def test_a_dense_model_is_refused_before_its_text_is_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make("gemma4-dense", tmp_path / "dense")))
    options = RoutingOptions(texts=(("a", tmp_path / "missing"),))
    with pytest.raises(ArchitectureError, match=r"dense has no layer with experts \(4 dense"):
        analyse_routing(checkpoint, describe(checkpoint), options)


def test_every_text_that_is_too_short_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make("qwen3-moe", tmp_path / "moe")))
    (tmp_path / "s.txt").write_text("a few words")
    (tmp_path / "l.txt").write_text(ONE_LINE)
    texts = tuple((name, tmp_path / f"{name[0]}.txt") for name in ("short", "long", "scant"))
    with pytest.raises(CalibrationError, match=r"needs 64 tokens.*short has \d+, scant has \d+:"):
        analyse_routing(checkpoint, describe(checkpoint), RoutingOptions(texts, 64, 64))


def test_sequences_longer_than_the_model_s_context_are_noted(tmp_path: Path) -> None:
    folder, text = make("qwen3-moe", tmp_path / "moe"), tmp_path / "text.txt"
    text.write_text(ONE_LINE)
    options = RoutingOptions((("text", text),), 64, 64, ablation=False)
    for longest, noted in ((64, False), (63, True)):
        config = json.loads((folder / "config.json").read_text())
        assert "max_position_embeddings" in config
        changed = json.dumps(config | {"max_position_embeddings": longest})
        (folder / "config.json").write_text(changed)
        checkpoint = open_checkpoint(str(folder))
        notes = analyse_routing(checkpoint, describe(checkpoint), options).notes
        assert [*map(str, notes)] == [] or noted
        assert (
            not noted or "--sequence-length 64 is more than the model's context of 63" in notes[0]
        )


def test_texts_with_too_few_sequences_are_noted(tmp_path: Path) -> None:
    """Two texts need four each; one has three. A single text needs none."""
    checkpoint = open_checkpoint(str(make("qwen3-moe", tmp_path / "moe")))
    text = tmp_path / "text.txt"
    text.write_text(ONE_LINE * 2)
    short = tmp_path / "short.txt"
    short.write_text(ONE_LINE)
    spec, found = describe(checkpoint), {}
    for names in ((text, short), (text, text), (short,)):
        texts = tuple((f"text {n}", path) for n, path in enumerate(names))
        options = RoutingOptions(texts, 4 * 150, 150, ablation=False)
        found[names] = analyse_routing(checkpoint, spec, options)
    assert found[text, text].texts == {"text 0": 600, "text 1": 600}
    assert found[text, short].texts == {"text 0": 600, "text 1": 450}
    assert found[text, text].notes == found[short,].notes == ()
    (note,) = found[text, short].notes
    assert note.startswith("Too few sequences of 150 tokens to tell whether experts prefer a text:")
    assert "text 1 has 3, and 4 of each" in note and "--tokens" in note


def test_activations_that_overflow_are_an_error(tmp_path: Path) -> None:
    folder = edited(
        make("qwen3-moe", tmp_path / "a"), tmp_path / "b", "post_attention_layernorm.weight",
        lambda weight: weight.fill_(3e38),
    )  # fmt: skip
    checkpoint, text = open_checkpoint(str(folder)), tmp_path / "text.txt"
    text.write_text(ONE_LINE)
    with pytest.raises(CalibrationError, match="layer 0: the output of .* is not finite"):
        analyse_routing(checkpoint, describe(checkpoint), RoutingOptions((("text", text),), 64, 64))


def test_the_built_in_corpus_is_a_text_per_file(tiny_model: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_model))
    found = text_windows(checkpoint.path, describe(checkpoint), RoutingOptions(tokens=1024))
    assert list(found) == ["code", "dialogue", "languages", "mathematics", "prose", "structured"]
    assert {tuple(part.shape) for part in found.values()} == {(2, 512)}

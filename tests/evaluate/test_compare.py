"""The side-by-side run against two ordinary transformers models and hooks on their layers."""

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moequant.checkpoint import open_checkpoint
from moequant.errors import CalibrationError, UsageError
from moequant.evaluate.compare import CompareOptions, Measurement, compare
from moequant.evaluate.models import MeasuredModel, of_checkpoint
from tests.calibrate.models import folder, reference, windows

# additive experts in some layers; gate and up fused by transformers; keys and values shared
CASES = ["gemma4-additive-some-layers", "qwen3-moe", "gemma4-ple"]
_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def noisy_folder(kind: str) -> Path:
    """The checkpoint of a kind with 3 % of noise on every matrix."""
    _KEPT.append(tempfile.TemporaryDirectory())
    copied = Path(shutil.copytree(folder(kind), Path(_KEPT[-1].name) / "noisy"))
    generator = torch.Generator().manual_seed(7)
    for shard in sorted(copied.glob("*.safetensors")):
        tensors = load_file(shard)
        for name, tensor in sorted(tensors.items()):
            if tensor.ndim > 1:
                noise = torch.randn(tensor.shape, generator=generator) * tensor.std()
                tensors[name] = (tensor + 0.03 * noise).contiguous()
        save_file(tensors, shard, metadata={"format": "pt"})
    return copied


@functools.cache
def models(kind: str) -> tuple[MeasuredModel, MeasuredModel]:
    return of_checkpoint(open_checkpoint(folder(kind))), of_checkpoint(
        open_checkpoint(noisy_folder(kind))
    )


@functools.cache
def measured(kind: str) -> Measurement:
    base, other = models(kind)
    (found,) = compare(base, [other], windows(), CompareOptions(sample_tokens=10**6))
    return found


@contextmanager
def watched(model: Any) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """What each layer gives, and the experts that each router chooses, by layer."""
    outputs: dict[int, Tensor] = {}
    chosen: dict[int, Tensor] = {}
    hooks = []
    for bid, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_hook(
            lambda _m, _a, out, bid=bid: outputs.__setitem__(bid, out)))  # fmt: skip
        for name, part in layer.named_modules():
            if name.endswith("experts"):
                hooks.append(part.register_forward_pre_hook(
                    lambda _m, args, bid=bid: chosen.__setitem__(bid, args[1])))  # fmt: skip
    try:
        yield outputs, chosen
    finally:
        for hook in hooks:
            hook.remove()


@functools.cache
def ordinary(kind: str, noisy: bool) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
    model = reference(kind, noisy_folder(kind) if noisy else None)
    with watched(model) as (outputs, chosen), torch.no_grad():
        logits = model(input_ids=windows(), use_cache=False).logits
    return outputs, chosen, logits


def relative(found: Tensor, expected: Tensor) -> float:
    error = (found.double() - expected.double()).square().sum(-1)
    return float((error / expected.double().square().sum(-1)).mean())


@pytest.mark.parametrize("kind", CASES)
def test_hidden_states_part_as_those_of_two_ordinary_models(kind: str) -> None:
    plain, noisy = ordinary(kind, False)[0], ordinary(kind, True)[0]
    assert len(measured(kind).layers) == len(plain)
    for layer in measured(kind).layers:
        expected = relative(noisy[layer.layer], plain[layer.layer])
        assert expected > 1e-5
        assert layer.hidden_nmse == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", CASES)
def test_predictions_diverge_as_the_ordinary_logits_do(kind: str) -> None:
    length = windows().shape[1]
    scored = slice(length // 2, length - 1)
    p, q = (ordinary(kind, noisy)[2][:, scored].double().log_softmax(-1) for noisy in (False, True))
    kld = (p.exp() * (p - q)).sum(-1).flatten()
    found = measured(kind).divergence
    assert found is not None
    torch.testing.assert_close(found.kld, kld, rtol=1e-3, atol=1e-5)
    assert found.same_top.tolist() == (p.argmax(-1) == q.argmax(-1)).flatten().tolist()
    targets = windows()[:, length // 2 + 1 :, None]
    torch.testing.assert_close(found.nll, -q.gather(-1, targets).flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma4-additive-some-layers", "qwen3-moe"])
def test_routers_overlap_as_their_choices_do(kind: str) -> None:
    plain, noisy = ordinary(kind, False)[1], ordinary(kind, True)[1]
    seen = []
    for layer in measured(kind).layers:
        if layer.layer not in plain:
            assert layer.router_overlap is None
            continue
        pairs = zip(plain[layer.layer].tolist(), noisy[layer.layer].tolist(), strict=True)
        shared = [len({*a} & {*b}) / len(a) for a, b in pairs]
        seen.append(layer.router_overlap)
        assert layer.router_overlap == pytest.approx(sum(shared) / len(shared), abs=2e-3)
    assert any(overlap is not None and overlap < 1 for overlap in seen)


@pytest.mark.parametrize("kind", CASES)
def test_a_tensor_s_error_is_that_of_an_ordinary_model_with_it_alone(kind: str) -> None:
    """Layer 1 of the whole reference, with one checkpoint tensor after the other replaced."""
    base, other = models(kind)
    plain = ordinary(kind, False)[0][1]
    errors = {error.name: error.nmse for error in measured(kind).tensors if error.layer == 1}
    matrices = [t for t in base.spec.tensors if t.bid == 1 and len(t.shape) > 1]
    used = [t for t in matrices if not t.name.endswith(("inp_gate.weight", "proj.weight"))]
    assert set(errors) == {t.name for t in matrices}
    for tensor in used[::3] + [t for t in used if t.is_expert]:
        with tempfile.TemporaryDirectory() as temporary:
            mixed = Path(shutil.copytree(folder(kind), Path(temporary) / "mixed"))
            for shard in sorted(mixed.glob("*.safetensors")):
                tensors = load_file(shard)
                for name in set(tensors) & set(tensor.sources):
                    tensors[name] = other.weights.read(name)
                save_file(tensors, shard, metadata={"format": "pt"})
            made = _run(kind, mixed)
        assert errors[tensor.name] == pytest.approx(relative(made[1], plain), rel=1e-2)


def _run(kind: str, path: Path) -> dict[int, Tensor]:
    model = reference(kind, path)
    with watched(model) as (outputs, _), torch.no_grad():
        model(input_ids=windows(), use_cache=False)
    return outputs


def with_noise(kind: str, path: Path, name: str) -> Path:
    """The checkpoint of a kind with half its own size of noise on the tensor `name`."""
    shutil.copytree(folder(kind), path)
    for shard in sorted(path.glob("*.safetensors")):
        tensors = load_file(shard)
        if name in tensors:
            noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(3))
            tensors[name] = tensors[name] + 0.5 * noise * tensors[name].std()
            save_file(tensors, shard, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gemma4-ple", "per_layer_token_embd.weight"),
        ("gemma4-ple", "per_layer_model_proj.weight"),
        ("gemma4-ple", "blk.2.inp_gate.weight"),
        ("gemma4-additive-some-layers", "blk.1.ffn_gate_inp.weight"),
        ("gemma4-additive-some-layers", "token_embd.weight"),
        ("qwen3-moe", "blk.3.ffn_up_exps.weight"),
        ("qwen3-moe", "output.weight"),
    ],
)
def test_the_tensor_that_was_damaged_is_the_worst(kind: str, name: str, tmp_path: Path) -> None:
    base, _ = models(kind)
    (tensor,) = [t for t in base.spec.tensors if t.name == name]
    other = with_noise(kind, tmp_path / "noisy", tensor.sources[0])
    (found,) = compare(base, [of_checkpoint(open_checkpoint(other))], windows(), CompareOptions())
    assert found.divergence is not None and found.divergence.mean_kld.value > 1e-6
    worst = found.worst_tensors(3)
    assert worst[0].name == name
    rest = {error.name.partition(" ")[0] for error in worst[1:]}
    assert rest <= {name}  # as embeddings and, tied, as output; nothing without an error


def test_the_error_of_per_layer_embeddings_is_that_of_an_ordinary_model(tmp_path: Path) -> None:
    """In layer 0, whose input is the reference's whatever the per-layer embeddings are."""
    kind = "gemma4-ple"
    base, _ = models(kind)
    (tensor,) = [t for t in base.spec.tensors if t.name == "per_layer_token_embd.weight"]
    path = with_noise(kind, tmp_path / "noisy", tensor.sources[0])
    (found,) = compare(
        base, [of_checkpoint(open_checkpoint(path))], windows(), CompareOptions(sample_tokens=10**6)
    )
    expected = relative(_run(kind, path)[0], ordinary(kind, False)[0][0])
    assert expected > 1e-6
    assert found.layers[0].own_nmse == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["qwen3-moe", "gemma4-additive-some-layers"])
def test_the_errors_of_embeddings_and_output_are_those_of_ordinary_models(kind: str) -> None:
    """Logits of the reference's last hidden states with the other's output matrix, centred."""
    plain, noisy = reference(kind), reference(kind, noisy_folder(kind))
    with torch.no_grad():
        tables = [model.get_input_embeddings()(windows()) for model in (plain, noisy)]
        expected = plain(input_ids=windows(), use_cache=False).logits.double()
        plain.lm_head.weight = noisy.lm_head.weight  # the embeddings stay
        swapped = plain.lm_head(_last_hidden(kind)).double()
        cap = getattr(plain.config, "final_logit_softcapping", None)
        swapped = cap * (swapped / cap).tanh() if cap else swapped
    errors = {error.name: error.nmse for error in measured(kind).tensors}
    assert errors["token_embd.weight"] == pytest.approx(relative(tables[1], tables[0]), rel=1e-3)
    name = "output.weight" if "output.weight" in errors else "token_embd.weight (as output)"
    centred = [logits - logits.mean(-1, keepdim=True) for logits in (swapped, expected)]
    assert errors[name] == pytest.approx(relative(*centred), rel=1e-3)


def _last_hidden(kind: str) -> Tensor:
    """What the output matrix of the reference is given."""
    with torch.no_grad():
        states: Tensor = reference(kind).model(input_ids=windows(), use_cache=False)[0]
    return states


def test_a_model_does_not_differ_from_itself() -> None:
    base, _ = models("gemma4-additive-some-layers")
    (found,) = compare(base, [base], windows(), CompareOptions())
    assert found.divergence is not None
    assert found.divergence.kld.abs().max() < 1e-9
    assert {(layer.hidden_nmse, layer.own_nmse) for layer in found.layers} == {(0.0, 0.0)}
    assert {error.nmse for error in found.tensors} == {0.0}
    assert {layer.router_overlap for layer in found.layers} == {None, 1.0}


def test_own_errors_do_not_pile_up() -> None:
    """The layer's own error is on the reference's hidden states, so below what has piled up."""
    layers = measured("qwen3-moe").layers
    assert layers[0].own_nmse > 0
    assert layers[-1].own_nmse < layers[-1].hidden_nmse


def test_the_worst_come_first() -> None:
    found = measured("qwen3-moe")
    by_error = sorted(found.tensors, key=lambda t: t.nmse, reverse=True)
    assert found.worst_tensors(3) == by_error[:3]
    assert found.worst_layers(1)[0].own_nmse == max(layer.own_nmse for layer in found.layers)


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    kind = "qwen3-moe"
    base, _ = models(kind)
    shutil.copytree(folder(kind), tmp_path / "huge")
    for shard in sorted((tmp_path / "huge").glob("*.safetensors")):
        tensors = {
            n: t * 1e37 if "1.input_layernorm" in n else t for n, t in load_file(shard).items()
        }
        save_file(tensors, shard, metadata={"format": "pt"})
    other = of_checkpoint(open_checkpoint(tmp_path / "huge"))
    with pytest.raises(CalibrationError, match=r"huge, layer 1: \d+ values are not finite"):
        compare(base, [other], windows(), CompareOptions())


def test_windows_too_short_to_score_are_refused() -> None:
    base, other = models("qwen3-moe")
    with pytest.raises(UsageError, match="nothing to score"):
        compare(base, [other], windows(1, 2), CompareOptions())

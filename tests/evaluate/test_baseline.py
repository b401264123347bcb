"""The bitsandbytes baseline against bitsandbytes' own modules and transformers' own choice."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moequant.architectures import describe
from moequant.calibrate.forward import empty_model
from moequant.checkpoint import open_checkpoint
from moequant.errors import UsageError
from moequant.evaluate import perplexity
from moequant.evaluate.baseline import BASELINES, BaselineWeights, quantized_bytes
from tests.calibrate.models import described, windows
from tests.checkpoints import make_checkpoint

bnb = pytest.importorskip("bitsandbytes")


def module_of(kind: str, weight: torch.Tensor) -> nn.Module:
    """bitsandbytes' own linear layer holding `weight` (rows, in), quantized on the CPU."""
    rows, columns = weight.shape
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(
            columns, rows, bias=False, quant_type="nf4", compress_statistics=False
        )
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=False
        )
    else:
        layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def held(kind: str, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What the module's weight dequantizes to, and the bytes of its codes and absmax."""
    parameter = module_of(kind, weight).weight
    if kind == "nf4":
        state = parameter.quant_state
        values = bnb.functional.dequantize_4bit(parameter.data, state)
        return values, parameter.data.nbytes + state.absmax.nbytes
    values = bnb.functional.int8_vectorwise_dequant(parameter.data, parameter.SCB)
    return values, parameter.data.nbytes + parameter.SCB.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", BASELINES)
def test_values_and_sizes_are_those_of_bitsandbytes_modules(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(make_checkpoint("qwen3-moe", tmp_path / "c", dtype=dtype))
    weights = BaselineWeights(checkpoint, describe(checkpoint), kind)
    for part in ("layers.1.self_attn.q_proj.weight", "layers.2.mlp.experts.7.down_proj.weight"):
        name = f"model.{part}"
        values, nbytes = held(kind, checkpoint.read(name))
        assert torch.equal(weights.read(name), values)
        assert not torch.equal(values.to(dtype), checkpoint.read(name))
        assert quantized_bytes(values.shape, kind) == nbytes
    kept = "model.embed_tokens.weight"
    assert torch.equal(weights.read(kept), checkpoint.read(kept))


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize("shape", [(3, 64), (5, 33), (1, 1), (96, 100)])
def test_sizes_hold_for_any_shape(kind: str, shape: tuple[int, int]) -> None:
    _, nbytes = held(kind, torch.randn(shape))
    assert quantized_bytes(shape, kind) == nbytes
    assert quantized_bytes((4, *shape), kind) == 4 * nbytes


@pytest.mark.parametrize("kind", ["gemma4-additive-some-layers", "gemma4-ple", "qwen3-moe"])
def test_linears_are_those_that_transformers_replaces(kind: str) -> None:
    """transformers' own `replace_with_bnb_linear`, with what its quantizer leaves out."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    checkpoint, spec = described(kind)
    model = copy.deepcopy(empty_model(spec))
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, skipped, BitsAndBytesConfig(load_in_8bit=True))
    replaced = {
        path.removeprefix("model.") + ".weight"
        for path, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear8bitLt)
    }
    experts = {name for t in spec.tensors if t.is_expert for name in t.sources}
    found = BaselineWeights(checkpoint, spec, "int8").quantized
    assert {name.removeprefix(spec.prefix) for name in found - experts} == replaced
    assert experts <= found


def test_experts_of_one_stack_are_quantized_one_by_one() -> None:
    checkpoint, spec = described("gemma4-additive")
    weights = BaselineWeights(checkpoint, spec, "nf4")
    name = next(n for n in weights.quantized if n.endswith("layers.1.experts.down_proj"))
    stack = checkpoint.read(name)
    expected = torch.stack([held("nf4", matrix)[0] for matrix in stack])
    assert torch.equal(weights.read(name), expected)
    assert torch.equal(weights.read_slice(name, 3, 5), expected[3:5])
    vectors = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights.read_slice(vectors, 2, 9), weights.read(vectors)[2:9])


@pytest.mark.parametrize("kind", BASELINES)
def test_the_size_is_the_sum_of_what_bitsandbytes_holds(kind: str) -> None:
    checkpoint, spec = described("gemma4-additive")
    weights = BaselineWeights(checkpoint, spec, kind)
    total = 0
    for name in {n for t in spec.tensors for n in t.sources}:
        tensor = checkpoint.read(name)
        if name not in weights.quantized:
            total += tensor.nbytes
            continue
        total += sum(held(kind, m)[1] for m in (tensor if tensor.ndim == 3 else tensor[None]))
    assert weights.size_bytes == total
    values = sum(checkpoint.tensors[n].nbytes // 4 for t in spec.tensors for n in t.sources)
    assert weights.bpw == pytest.approx(8 * total / values)


def test_int8_is_closer_than_nf4_in_the_forward() -> None:
    checkpoint, spec = described("qwen3-moe")
    ids = windows(2, 33)
    exact = perplexity(checkpoint, spec, ids).nll
    off = {
        kind: (perplexity(BaselineWeights(checkpoint, spec, kind), spec, ids).nll - exact).abs()
        for kind in BASELINES
    }
    assert 0 < off["int8"].mean() < off["nf4"].mean() < 1


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="fp4"):
        BaselineWeights(*described("qwen3-dense"), "fp4")


@pytest.mark.parametrize("kind", BASELINES)
def test_a_model_that_transformers_loads_in_it_is_the_same(kind: str, tmp_path: Path) -> None:
    """A dense model: there transformers converts all that we do. Sizes and every value."""
    import transformers

    folder = make_checkpoint("qwen3-dense", tmp_path / "c", dtype=torch.bfloat16)
    arguments: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        arguments = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.BitsAndBytesConfig(**arguments),
        device_map={"": "cpu"}, dtype=torch.bfloat16,
    )  # fmt: skip
    checkpoint = open_checkpoint(folder)
    weights = BaselineWeights(checkpoint, describe(checkpoint), kind)
    total = 0
    for name, parameter in model.named_parameters():
        total += parameter.data.nbytes
        if kind == "nf4" and name in weights.quantized:
            total += parameter.quant_state.absmax.nbytes
            values = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
        elif name in weights.quantized:
            total += parameter.SCB.nbytes
            values = bnb.functional.int8_vectorwise_dequant(parameter.data, parameter.SCB)
        else:
            values = parameter.data
        assert torch.equal(weights.read(name), values), name
    assert weights.size_bytes == total

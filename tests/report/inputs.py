"""What a report is made from, built by hand: GGUF files, evaluations, routings of any size.

The numbers are made up but lie where real ones do; the shapes of the JSON are those that `moequant
evaluate --json` and `moequant routing --json` print, which `test_real` checks against the commands.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType

from moequant.gguf_export.writer import MetadataEntry, TensorToWrite, write_gguf

KINDS = {bool: GGUFValueType.BOOL, int: GGUFValueType.INT64,
         float: GGUFValueType.FLOAT64, str: GGUFValueType.STRING}  # fmt: skip


def entry(key: str, value: Any) -> MetadataEntry:
    """A key with the type that its Python value suggests."""
    if not isinstance(value, list):
        return MetadataEntry(key, value, KINDS[type(value)])
    return MetadataEntry(key, value, GGUFValueType.ARRAY, KINDS[type(value[0])])


def tensor(name: str, shape: tuple[int, ...], qtype: str) -> TensorToWrite:
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[qtype]]
    return TensorToWrite(name, shape, qtype, math.prod(shape) // block * nbytes)


def write_model(
    path: Path,
    layers: int = 2,
    experts: int = 4,
    *,
    banked: bool = False,
    metadata: dict[str, Any] | None = None,
    extra: tuple[TensorToWrite, ...] = (),
) -> Path:
    """A GGUF file of zeros with the tensors and keys of an exported model.

    `banked`: experts of even layers lie in two banks, the first quarter of them in the finer one.
    """
    tensors = [tensor("token_embd.weight", (64, 256), "Q6_K"), *extra]
    data: dict[str, bytes] = {}
    for layer in range(layers):
        stem = f"blk.{layer}."
        fine = layer < layers // 8 or layer % 3 == 2
        tensors += [
            tensor(stem + "attn_norm.weight", (256,), "F32"),
            tensor(stem + "attn_q.weight", (32, 256), "Q4_K"),
            tensor(stem + "attn_v.weight", (16, 256), "Q6_K" if fine else "Q4_K"),
            tensor(stem + "ffn_gate_inp.weight", (experts, 256), "F32"),
            tensor(stem + "ffn_gate_up_exps.weight", (experts, 4, 256), "Q4_K"),
        ]
        down = stem + "ffn_down_exps"
        if not banked or layer % 2:
            qtype = "Q8_0" if fine else "Q5_0"
            tensors.append(tensor(f"{down}.weight", (experts, 4, 96), qtype))
            continue
        few = experts // 4
        bank_map = np.full((2, experts), -1, "<i4")
        bank_map[0, :few], bank_map[1, few:] = range(few), range(experts - few)
        data[f"{down}.bank_map"] = bank_map.tobytes()
        tensors += [tensor(f"{down}.bank0.weight", (few, 4, 96), "Q8_0"),
                    tensor(f"{down}.bank1.weight", (experts - few, 4, 96), "Q4_0"),
                    tensor(f"{down}.bank_map", (2, experts), "I32")]  # fmt: skip
    keys = {
        "general.name": "Made up", "qwen3moe.expert_count": experts,
        "qwen3moe.expert_used_count": 2, "moequant.version": "0.1.0",
        "moequant.plan.preset": "Q4_K_M", "moequant.experts.layers": list(range(layers)),
        "moequant.experts.routed_share": shares(layers, experts).ravel().tolist(),
        "moequant.experts.thin": [f"blk.{layer} expert {experts - 1}: 3 tokens, 29 lent"
                                  for layer in range(0, layers, 4)],
        "moequant.plan.fallbacks": [f"blk.{layer}.ffn_down_exps.weight Q4_K -> Q5_0: rows of 96"
                                    for layer in range(layers)],
    }  # fmt: skip
    if banked:
        keys |= {"qwen3moe.expert_bank_version": 1, "qwen3moe.expert_bank_count": 2}
    keys |= metadata or {}
    write_gguf(
        path, "qwen3moe", [entry(key, value) for key, value in keys.items()], tensors,
        lambda made: [data.get(made.name, bytes(made.nbytes))],
    )  # fmt: skip
    return path


def shares(layers: int, experts: int) -> np.ndarray:
    """Shares of routed tokens, rows summing to 1; deeper layers are less balanced."""
    random = np.random.default_rng(5)
    load = random.lognormal(0, np.linspace(0.2, 0.8, layers)[:, None], (layers, experts))
    return load / load.sum(1, keepdims=True)


def stored(model: Path) -> list[dict[str, Any]]:
    """The tensors of a file, read by gguf-py, as an evaluation lists them: banks as one."""
    found: dict[str, dict[str, Any]] = {}
    for read in GGUFReader(model).tensors:
        name, qtype = re.sub(r"\.bank[0-9]+", "", read.name), read.tensor_type.name
        if name.endswith(".bank_map"):
            continue
        layer = re.match(r"blk\.([0-9]+)\.", name)
        new = {"name": name, "qtype": qtype, "nbytes": 0,
               "layer": None if layer is None else int(layer[1]),
               "nmse": 0.003 if "ffn_gate_up" in name else None}  # fmt: skip
        row = found.setdefault(name, new)
        if qtype not in row["qtype"].split("+"):
            row["qtype"] += f"+{qtype}"
        row["nbytes"] += int(read.n_bytes)
    return list(found.values())


def sizes(model: Path) -> dict[str, Any]:
    """`bytes` and `bpw` of a file, counted by gguf-py's reader; maps of banks hold no weights."""
    tensors = GGUFReader(model).tensors
    nbytes = sum(int(tensor.n_bytes) for tensor in tensors)
    weights = sum(int(tensor.n_elements) for tensor in tensors if "bank_map" not in tensor.name)
    return {"bytes": nbytes, "bpw": 8 * nbytes / weights}


def model_json(name: str, layers: int, error: float) -> dict[str, Any]:
    """One row of an evaluation: `error` is about its mean KLD."""
    random = np.random.default_rng(7)
    sample = random.lognormal(math.log(error / 3), 1.5, 20000)
    edges = np.geomspace(1e-8, 10, 91)
    counts, _ = np.histogram(np.clip(sample, 1e-8, 9.9), edges)
    quantile = {"min": 0, "median": 50, "p90": 90, "p95": 95, "p99": 99, "p999": 99.9, "max": 100}
    kld = {key: float(np.percentile(sample, percent)) for key, percent in quantile.items()}
    own = error * (0.4 + random.random(layers))
    return {
        "name": name, "bytes": 7_300_000, "bpw": 5.17,
        "perplexity": {"ppl": 11.27 * math.exp(error), "stderr": 0.31},
        "ppl_ratio": {"value": math.exp(error), "stderr": error / 9},
        "kld": {"mean": float(sample.mean()), "stderr": error / 40, **kld},
        "kld_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "top1": {"share": 1 - 4 * error, "stderr": 0.0021},
        "delta_p": {"mean": -0.001, "rms": 0.021, "rms_stderr": 0.0004},
        "layers": [{"layer": i, "hidden_nmse": float(own[: i + 1].sum()),
                    "own_nmse": float(own[i]), "router_overlap": float(1 - 2 * own[i])}
                   for i in range(layers)],
        "tensors": [],
        "worst_layers": list(range(layers))[-3:],
        "worst_tensors": [f"blk.{i}.ffn_gate_up_exps.weight" for i in range(layers)][-3:],
    }  # fmt: skip


def evaluation_json(model: Path, layers: int = 2) -> dict[str, Any]:
    """An evaluation of the file `model`, which has that many layers."""
    measured = model_json(model.name, layers, 0.0105) | sizes(model)
    measured["tensors"] = stored(model)
    return {
        "file": model.name, "reference": "org/made-up", "engine": "moequant",
        "text": {"name": "held-out.txt", "chat": False, "windows": 40, "length": 512,
                 "tokens_scored": 10200},
        "notes": [], "reference_perplexity": {"ppl": 11.27, "stderr": 0.3},
        "models": [measured, model_json("nf4", 0, 0.031)],
    }  # fmt: skip


def routing_json(layers: int = 2, experts: int = 4) -> dict[str, Any]:
    rows = []
    for layer, share in enumerate(shares(layers, experts)):
        rows.append({
            "layer": layer, "share": share.tolist(), "gate_share": share.tolist(),
            "gini": 0.21, "entropy": 3.7,
            "confidence": {"top1": 0.41, "chosen_mass": 0.8, "entropy": 2.1},
            "dead": [], "dominant": [int(share.argmax())], "domain_share": {"code": share.tolist()},
            "specialisation_bits": 0.12, "specialisation_chance_bits": 0.01, "specialists": [],
            "cosine": {"mean": 0.02, "max": 0.4, "pair": [0, 1]},
            "branch": {"experts_rms": 0.6, "dense_rms": 1.2, "ratio": 0.5, "cosine": 0.1},
        })  # fmt: skip
    names = {"experts off": 0, "top-1": 1, "top-2": 2, "top-3": 3, "top-4": 4}
    ablation = [
        {"name": name, "experts": k, "ppl": 11.27 * (1 + 0.9 * 0.3**k), "stderr": 0.3,
         "delta_nll": 0.6 * 0.3**k, "delta_nll_stderr": 0.01} for name, k in names.items()
    ]  # fmt: skip
    texts = [{"name": "prose", "tokens": 4000}, {"name": "code", "tokens": 5000}]
    return {"checkpoint": "org/made-up", "texts": texts, "layers": rows, "ablation": ablation}

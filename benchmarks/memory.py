"""Peak memory of calibration, or of evaluation, does not grow with depth.

Makes a synthetic Gemma 4 additive MoE with layers of real size, in bfloat16 and streamed to disk,
once shallow and once deep, runs the stage on each in a process of its own, and compares peak RSS.
The evaluation holds the model against itself, in float32, with every error measured. Run by hand;
needs 6 GB of disk for the defaults and about five minutes on two cores:

    python benchmarks/memory.py [--stage evaluate] [--json]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, EXPERT_WIDTH = 2048, 6144, 16, 4, 1408
HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 16, 8, 128, 32768


def config(layers: int) -> dict[str, Any]:
    """config.json of the synthetic model."""
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    return {
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "dtype": "bfloat16",
        "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "layer_types": kinds, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "num_global_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "global_head_dim": HEAD_DIM,
        "sliding_window": 512, "hidden_size_per_layer_input": 0, "attention_k_eq_v": False,
        "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": TOP_K,
        "moe_intermediate_size": EXPERT_WIDTH, "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    }  # fmt: skip


def make_checkpoint(folder: Path, layers: int) -> None:
    """One shard for each layer, written and forgotten; shapes as transformers has them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(layers)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            part = f"layer-{name.split('.')[2]}" if ".layers." in name else "rest"
            shards.setdefault(f"{part}.safetensors", []).append((name, tensor.shape))
    for file, tensors in shards.items():
        values = {name: random_weight(name, shape, generator) for name, shape in tensors}
        save_file(values, folder / file)
    index = {name: file for file, tensors in shards.items() for name, _ in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Norms and scales of one, matrices that keep the scale of what they multiply."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 1.0 if "router" in name else shape[-1] ** -0.5
    values = torch.empty(shape, dtype=torch.bfloat16)
    return values.uniform_(-1.7 * scale, 1.7 * scale, generator=generator)


def run_once(stage: str, folder: Path, tokens: int) -> dict[str, float]:
    """The stage on random tokens in this process; peak RSS in MB and seconds."""
    from moequant.checkpoint import open_checkpoint
    from moequant.evaluate.models import of_checkpoint

    model = of_checkpoint(open_checkpoint(folder))
    before = peak_rss()
    ids = torch.randint(
        VOCABULARY, (tokens // 512, 512), generator=torch.Generator().manual_seed(1)
    )
    start = time.monotonic()
    (calibrate if stage == "calibrate" else evaluate)(model, ids)
    return {
        "peak_rss_mb": round(peak_rss()),
        "before_mb": round(before),
        "seconds": round(time.monotonic() - start, 1),
        "layer_mb": round(sum(f.stat().st_size for f in folder.glob("layer-0.*")) / 2**20),
        "checkpoint_mb": round(sum(f.stat().st_size for f in folder.glob("*.s*")) / 2**20),
    }


def peak_rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def calibrate(model: Any, ids: torch.Tensor) -> None:
    from moequant.calibrate import CalibrationOptions
    from moequant.calibrate.forward import StreamedModel
    from moequant.calibrate.run import observe_model

    streamed = StreamedModel(model.weights, model.spec)
    observe_model(streamed, ids, CalibrationOptions(batch_tokens=1024))


def evaluate(model: Any, ids: torch.Tensor) -> None:
    from moequant.evaluate.compare import CompareOptions, compare

    (found,) = compare(model, [model], ids, CompareOptions(batch_tokens=1024))
    assert found.divergence is not None and found.divergence.mean_kld.value < 1e-9


def main() -> None:
    """Measure both depths and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs=2, default=(4, 16), metavar=("FEW", "MANY"))
    parser.add_argument("--stage", choices=("calibrate", "evaluate"), default="calibrate")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)  # in processes of their own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_checkpoint(arguments.folder, arguments.make)
        return
    if arguments.folder:
        print(json.dumps(run_once(arguments.stage, arguments.folder, arguments.tokens)))
        return
    runs = {}
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as scratch:
            # a process inherits its parent's peak across exec, so this one stays small
            command = [sys.executable, __file__, "--folder", f"{scratch}/model"]
            subprocess.run([*command, "--make", str(layers)], check=True)
            command += ["--stage", arguments.stage, "--tokens", str(arguments.tokens)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[layers] = json.loads(done.stdout.splitlines()[-1])
        if not arguments.json:
            print(f"{layers} layers: {runs[layers]}")
    few, many = (runs[layers]["peak_rss_mb"] for layers in arguments.layers)
    result = {"tokens": arguments.tokens, "hidden_size": HIDDEN, "runs": runs, "ratio": many / few}
    print(json.dumps(result) if arguments.json else f"peak RSS ratio: {many / few:.3f}")


if __name__ == "__main__":
    main()

"""transformers' ordinary forward with hooks, as the tests of routing hold moequant's against."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.calibrate.models import reference
from tests.checkpoints import FULL, SLIDING, make_checkpoint

SHARED_KV = "gemma4-additive-shared-kv"  # the last two layers reuse keys and values of earlier ones
TOP_K = {"gemma4": "top_k_experts", "qwen3": "num_experts_per_tok"}


def make(kind: str, folder: Path) -> Path:
    """The checkpoint of a kind in float32; `SHARED_KV` is one more kind."""
    if kind == SHARED_KV:
        return make_checkpoint(
            "gemma4-additive",
            folder,
            dtype=torch.float32,
            num_hidden_layers=4,
            layer_types=[SLIDING, FULL] * 2,
            num_kv_shared_layers=2,
            attention_k_eq_v=False,
            hidden_size_per_layer_input=64,
        )
    return make_checkpoint(kind, folder, dtype=torch.float32)


def with_top_k(kind: str, folder: Path, k: int, copied: Path) -> Any:
    """transformers' model of a copy of `folder` whose config.json says k experts per token."""
    shutil.copytree(folder, copied)
    path = copied / "config.json"
    config = json.loads(path.read_text())
    key = TOP_K[kind.partition("-")[0]]
    assert config[key] == 4
    path.write_text(json.dumps(config | {key: k}))
    return reference(kind, copied)


def without_experts(model: Any) -> Any:
    """A copy whose experts put out zeros: their down projections are."""
    made = copy.deepcopy(model)
    for name, parameter in made.named_parameters():
        if name.endswith("experts.down_proj"):
            parameter.data.zero_()
    return made


@torch.no_grad()
def losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the second half of each window, float64 (windows, scored)."""
    first = ids.shape[1] // 2
    logits = model(input_ids=ids).logits[:, first:-1].double()
    scored: torch.Tensor = -logits.log_softmax(-1).gather(-1, ids[:, first + 1 :, None])
    return scored.squeeze(-1)


class Seen:
    """What the modules of one layer were given and gave, for all tokens of one forward."""

    def __init__(self, layer: Any) -> None:
        """Put the hooks in place."""
        self.chosen = self.gates = self.logits = self.dense = self.experts = torch.empty(0)
        block = layer if hasattr(layer, "experts") else layer.mlp
        block.experts.register_forward_pre_hook(self._routed)
        if hasattr(layer, "router"):
            layer.router.proj.register_forward_hook(self._scored)
            layer.post_feedforward_layernorm_1.register_forward_hook(self._dense)
            layer.post_feedforward_layernorm_2.register_forward_hook(self._experts)
        else:
            block.gate.register_forward_hook(lambda *seen: self._scored(*seen[:2], seen[2][0]))

    def _routed(self, _: Any, args: Any) -> None:
        _, self.chosen, self.gates = args

    def _scored(self, _module: Any, _args: Any, output: torch.Tensor) -> None:
        self.logits = output.double()

    def _dense(self, _module: Any, _args: Any, output: torch.Tensor) -> None:
        self.dense = output.double().flatten(0, 1)

    def _experts(self, _module: Any, _args: Any, output: torch.Tensor) -> None:
        self.experts = output.double().flatten(0, 1)

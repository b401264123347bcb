"""Train the tiny additive MoE of this folder: a dense Gemma 4, then experts beside its MLP.

The pipeline, top to bottom (`make`):

1. gather text from Debian packages (`tiny_corpus.py`) and train a tokenizer on it
   (`tiny_tokenizer.py`);
2. train a dense `Gemma4ForCausalLM`;
3. mutate it: every layer keeps its MLP and gets a router and experts beside it;
4. train these, with a load-balancing loss;
5. save as bf16 safetensors and measure the saved file on the held-out text, once as it is and
   once with the experts' branch zeroed.

Rerun:  python examples/make_tiny_additive_moe.py --output my-tiny-moe
Measure only:  python examples/make_tiny_additive_moe.py --evaluate

Each phase writes checkpoints to the work folder and resumes from them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tiny_corpus
import torch
import torch.nn.functional as F
from tiny_tokenizer import VOCAB_SIZE, make_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GemmaTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

HERE = Path(__file__).resolve().parent
MODEL = HERE / "tiny-additive-moe"
WINDOW = 512  # tokens per training row and per evaluation window, <bos> included
BATCH = 4  # rows per step
BALANCE = 0.01  # weight of the load-balancing loss


# ---------------------------------------------------------------------------- text


def as_chat(text: str) -> str:
    """A document as one exchange: its first line asked for, the rest answered."""
    title, _, body = text.partition("\n")
    return f"<|turn>user\n{title.strip()}<turn|>\n<|turn>model\n{body.strip()}<turn|>\n"


def encode_corpus(corpus: dict[str, list[str]], tokenizer: GemmaTokenizer) -> Tensor:
    """All documents as one row of token ids, each followed by <eos>, one in 16 as a chat."""
    texts = [text for domain in corpus.values() for text in domain]
    texts = [as_chat(text) if i % 16 == 0 else text for i, text in enumerate(texts)]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([i for row in rows for i in (*row, tokenizer.eos_token_id)])


def batches(tokens: Tensor, bos: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of (BATCH, WINDOW) ids: windows of the corpus in random order behind <bos>.

    The windows of an epoch tile the corpus from a random offset, so that nothing is seen twice
    before everything was seen once.
    """
    generator = torch.Generator().manual_seed(seed)
    length = WINDOW - 1
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        rows = tokens[offset:]
        rows = rows[: len(rows) // length * length].view(-1, length)
        rows = F.pad(rows[torch.randperm(len(rows), generator=generator)], (1, 0), value=bos)
        yield from rows[: len(rows) // BATCH * BATCH].split(BATCH)


# ---------------------------------------------------------------------------- model


def shape(*, moe: bool) -> Gemma4TextConfig:
    """The model's shape; `moe` adds router and experts to an otherwise equal dense model."""
    experts = {"num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 96} if moe else {}
    return Gemma4TextConfig(
        vocab_size=VOCAB_SIZE,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size=256,
        hidden_size_per_layer_input=0,
        intermediate_size=512,
        num_hidden_layers=6,  # five sliding, one full
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        global_head_dim=128,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=256,
        max_position_embeddings=2048,
        final_logit_softcapping=30.0,
        enable_moe_block=moe,
        **experts,
    )


def make_dense() -> Gemma4ForCausalLM:
    """A dense model with random weights.

    Gemma 4 does not divide attention scores by sqrt(head_dim): the query and key norms hold that
    factor, so they start with it. `layer_scalar` is not trained; values other than 1 make an
    export that forgets it fail visibly.
    """
    model = Gemma4ForCausalLM(shape(moe=False))
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        nn.init.constant_(attention.q_norm.weight, attention.head_dim**-0.25)
        nn.init.constant_(attention.k_norm.weight, attention.head_dim**-0.25)
        layer.layer_scalar.fill_(1 - (i + 1) / 16)
    return model


def mutate(dense: Gemma4ForCausalLM) -> Gemma4ForCausalLM:
    """Add a router and random experts beside the MLP of every layer of `dense`.

    The experts read what the MLP reads, and their branch starts at half of the MLP's size
    (`post_feedforward_layernorm_2`). The matrices of the dense layers are frozen, so that what is
    still to be learnt is learnt by the experts; embedding and norms go on learning.
    """
    model = Gemma4ForCausalLM(shape(moe=True))
    model.load_state_dict(dense.state_dict(), strict=False)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for p in block.parameters():
                p.requires_grad_(p.ndim < 2)
        with torch.no_grad():
            before = layer.pre_feedforward_layernorm.weight
            layer.pre_feedforward_layernorm_2.weight.copy_(before)
            layer.post_feedforward_layernorm_2.weight.fill_(0.5)
            nn.init.normal_(layer.router.proj.weight, std=0.5)
    return model


def sorted_experts(module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Experts' forward for training on a CPU: rows sorted by expert, one product per expert.

    x: (tokens, hidden); chosen, weights: (tokens, top_k). Unlike the default loop it takes the
    stacked parameters apart once, so that the backward pass does not fill a whole stack of zeros
    per expert; and it fills every expert's rows up to a multiple of 64 (with token 0, whose
    results there are not used), because oneDNN compiles a kernel for every new number of rows.
    """
    expert, order = chosen.flatten().sort(stable=True)
    tokens = order // chosen.shape[1]
    counts = expert.bincount(minlength=module.num_experts)
    filled = (counts + 63) // 64 * 64
    shift = (filled.cumsum(0) - filled) - (counts.cumsum(0) - counts)
    place = torch.arange(len(order)) + shift[expert]
    source = torch.zeros(int(filled.sum()), dtype=torch.long)
    source[place] = tokens
    outputs = []
    stacks = (module.gate_up_proj.unbind(0), module.down_proj.unbind(0))
    for rows, gate_up, down in zip(x[source].split(filled.tolist()), *stacks, strict=True):
        gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(module.act_fn(gate) * up, down))
    routed = torch.cat(outputs)[place] * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add_(0, tokens, routed.to(x.dtype))


# ---------------------------------------------------------------------------- training


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for matrices and stacks of matrices (Jordan, 2024)."""

    def __init__(self, params: list[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": 0.05})

    @staticmethod
    def orthogonalise(g: Tensor) -> Tensor:
        """Nearest semi-orthogonal matrix of each (rows, cols) matrix in `g`, approximately."""
        x = g.bfloat16()
        wide = x.shape[-2] <= x.shape[-1]
        x = x if wide else x.mT
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            square = x @ x.mT
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return (x if wide else x.mT).float()

    @torch.no_grad()
    def step(self) -> None:
        """One update; scaled so that outputs of tall and wide matrices change alike."""
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = self.orthogonalise(p.grad.lerp(mean, group["momentum"]))
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices; Adam for embedding, router, norms and scales."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_matrix = p.ndim >= 2 and "embed" not in name and "router" not in name
            (matrices if is_matrix else rest).append(p)
    return [Muon(matrices, lr), torch.optim.Adam(rest, lr / 8, betas=(0.9, 0.95))]


def watch_routing(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A list that every router appends (probabilities, chosen experts) to on each forward."""
    seen: list[tuple[Tensor, Tensor]] = []
    for name, module in model.named_modules():
        if name.endswith(".router"):
            module.register_forward_hook(lambda _m, _i, out: seen.append((out[0], out[2])))
    return seen


def balance_loss(routing: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over layers of E · Σ_e share_e · probability_e, which is 1 if routing is even
    (Switch Transformer, Fedus et al., 2021, equation 4)."""
    losses = []
    for probabilities, chosen in routing:
        experts = probabilities.shape[-1]
        share = chosen.flatten().bincount(minlength=experts) / chosen.numel()
        losses.append(experts * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def next_token_loss(model: Gemma4ForCausalLM, ids: Tensor) -> Tensor:
    """Mean cross entropy (nats) of every token after the first of each row of `ids`."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@dataclass(frozen=True)
class Phase:
    """One stage of training: ends after `steps`, or after `minutes` if that is earlier."""

    name: str
    steps: int
    minutes: float
    lr: float
    decay: float  # share of the phase in which the learning rate falls
    floor: float  # what it falls to, as a share of `lr`

    def rate(self, progress: float) -> float:
        """Factor on the learning rate at `progress` in [0, 1]."""
        fall = max(0.0, progress - (1 - self.decay)) / self.decay
        return min(1.0, progress / 0.02 + 0.02) * (1 - fall * (1 - self.floor))


def train(
    model: Gemma4ForCausalLM,
    phase: Phase,
    data: Iterator[Tensor],
    work: Path,
    save: Callable[[Gemma4ForCausalLM], None] | None = None,
) -> Gemma4ForCausalLM:
    """Train `model` through `phase`, in place; every 5 minutes a checkpoint, and `save(model)`."""
    optimizers = make_optimizers(model, phase.lr)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    routing = watch_routing(model)
    path = work / f"{phase.name}.pt"
    step, spent = resume(path, model, optimizers)
    for _ in range(step):
        next(data)
    started, saved = time.time() - spent, time.time()
    model.train()
    while True:
        progress = max(step / phase.steps, (time.time() - started) / 60 / phase.minutes)
        if progress >= 1:
            break
        for optimizer, base in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * phase.rate(progress)
        routing.clear()
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model, next(data))
        balance = balance_loss(routing) if routing else torch.zeros(())
        (loss + BALANCE * balance).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 20 == 0:
            minutes = (time.time() - started) / 60
            figures = f"loss {loss.item():.3f} balance {balance.item():.3f}"
            print(f"{phase.name} step {step} {minutes:.1f} min {figures}", flush=True)
        if time.time() - saved > 300:
            checkpoint(path, model, optimizers, step, time.time() - started)
            if save:
                save(model)
            saved = time.time()
    checkpoint(path, model, optimizers, step, time.time() - started)
    return model


def checkpoint(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, spent: float
) -> None:
    """Write all that `resume` needs; `spent` in seconds."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    partial = path.with_suffix(".partial")
    torch.save({"model": model.state_dict(), "opt": states, "step": step, "spent": spent}, partial)
    partial.rename(path)


def resume(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Load a checkpoint if there is one; returns the steps done and the seconds they took."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["opt"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["spent"]


# ---------------------------------------------------------------------------- files, figures


def save_model(model: Gemma4ForCausalLM, tokenizer: GemmaTokenizer, folder: Path) -> None:
    """Write an ordinary Hugging Face checkpoint in bf16, each file at once under its name."""
    copy = Gemma4ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<eos>", "<turn|>", "<|tool_response>")]
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
        do_sample=True,
        temperature=1.0,
        top_k=64,
        top_p=0.95,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        copy.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        add_published_keys(Path(partial) / "config.json")
        for file in Path(partial).iterdir():
            file.chmod(0o644)
            file.rename(folder / file.name)


def add_published_keys(path: Path) -> None:
    """Add the two keys in which published Gemma 4 configs say what `per_layer_config` says."""
    config = json.loads(path.read_text())
    full = shape(moe=True).per_layer_config["full_attention"]
    config["global_head_dim"] = full.head_dim
    config["num_global_key_value_heads"] = full.num_key_value_heads
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def windows(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """`text` as (n, WINDOW) ids: consecutive pieces of WINDOW - 1 tokens, each behind <bos>.

    The tokens after the last whole window are left out.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // (WINDOW - 1) * (WINDOW - 1)].view(-1, WINDOW - 1)
    return F.pad(rows, (1, 0), value=tokenizer.bos_token_id)


@contextmanager
def experts_zeroed(model: Gemma4ForCausalLM) -> Iterator[None]:
    """Within it, the experts' branch of every layer adds nothing."""
    hooks = [
        layer.post_feedforward_layernorm_2.register_forward_hook(
            lambda _m, _i, out: torch.zeros_like(out)
        )
        for layer in model.model.layers
    ]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def perplexity(model: Gemma4ForCausalLM, rows: Tensor) -> float:
    """exp of the mean loss over all tokens but <bos>, computed in F32."""
    losses = [next_token_loss(model, batch) * len(batch) for batch in rows.split(BATCH)]
    return math.exp(float(torch.stack(losses).sum()) / len(rows))


def expert_use(routing: list[tuple[Tensor, Tensor]], config: Gemma4TextConfig) -> Tensor:
    """(layers, experts) share of the routed tokens, times the number of experts."""
    counts = [chosen.flatten().bincount(minlength=config.num_experts) for _, chosen in routing]
    per_layer = torch.stack(counts).view(-1, config.num_hidden_layers, config.num_experts).sum(0)
    return per_layer / per_layer.sum(-1, keepdim=True) * config.num_experts


def evaluate(folder: Path) -> None:
    """Print both perplexities of the saved bf16 model, and how evenly its experts are used."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    rows = windows(
        (MODEL / "held-out.txt").read_text(encoding="utf-8"), AutoTokenizer.from_pretrained(folder)
    )
    routing = watch_routing(model)
    whole = perplexity(model, rows)
    use = expert_use(routing, model.config)
    with experts_zeroed(model):
        zeroed = perplexity(model, rows)
    print(f"held-out: {len(rows)} windows of {WINDOW} tokens, perplexity {whole:.2f}")
    print(f"experts' branch zeroed: {zeroed:.2f} ({zeroed / whole - 1:+.0%})")
    print(f"expert use, even = 1: {use.min():.2f} to {use.max():.2f}")


def make(args: argparse.Namespace) -> None:
    """The whole pipeline."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    corpus = tiny_corpus.gather(args.work)
    tokenizer = make_tokenizer(text for texts in corpus.values() for text in texts)
    tokens = encode_corpus(corpus, tokenizer)
    print(f"{len(tokens):,} tokens of training text", flush=True)
    data = batches(tokens, tokenizer.bos_token_id, args.seed)

    dense = Phase("dense", args.dense_steps, args.minutes * 0.35, lr=0.02, decay=0.5, floor=0.5)
    moe = Phase("moe", args.moe_steps, args.minutes * 0.65, lr=0.02, decay=0.7, floor=0.01)
    model = mutate(train(make_dense(), dense, data, args.work))
    model.set_experts_implementation("sorted")
    train(model, moe, data, args.work, lambda m: save_model(m, tokenizer, args.output))
    save_model(model, tokenizer, args.output)


def main() -> None:
    """Parse the command line; make and measure, or only measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--work", type=Path, default=cache / "moequant" / "tiny-additive-moe")
    parser.add_argument("--output", type=Path, default=MODEL)
    parser.add_argument("--dense-steps", type=int, default=600)
    parser.add_argument("--moe-steps", type=int, default=900)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end training by then")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--evaluate", action="store_true", help="only measure what is there")
    args = parser.parse_args()
    if not args.evaluate:
        make(args)
    evaluate(args.output)


if __name__ == "__main__":
    main()

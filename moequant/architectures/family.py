"""The row of a model family, and what its rows are written in.

Owns: `Family` (one frozen row per family), `Row` (one per kind of tensor), `Scope` (the sizes and
features that the rows of one layer refer to), `Tokenizer`, `WithoutExperts`. Leaves out: the
families themselves (`gemma4`, `qwen3`), and what reads them (`describe`, `gguf_export`).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from moequant.architectures.file_keys import FileKeys
from moequant.architectures.keys import Key
from moequant.architectures.ops import COPY, Op

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One kind of tensor.

    `gguf` is the name, without `blk.N.` for a layer's. `source` is the checkpoint's name without
    what stands before the layer (or, outside layers, before the text model); empty for a constant.
    `shape` names sizes of the scope, in torch order. The row holds where the scope has the feature
    `when`. `at_head` marks a name that stands beside the text model, not in it (`lm_head`).
    `halves` are the GGUF names of two tensors that llama.cpp takes in place of this one: the first
    and the last half of the rows of each matrix.
    """

    gguf: str
    source: str
    shape: tuple[str, ...]
    when: str = ""
    op: Op = COPY
    at_head: bool = False
    halves: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scope:
    """What the rows of one layer (or those outside the layers) refer to.

    `features` are the conditions that hold. Tensors of rows under one that does not are an error,
    or, if it is in `unused`, knowingly left out: the model does not read them. `constants` are the
    values of the rows without a source.
    """

    sizes: Mapping[str, int]
    features: Collection[str] = frozenset()
    unused: Collection[str] = frozenset()
    constants: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A model's scopes: one for the rows outside the layers, one per layer."""

    outside: Scope
    layers: tuple[Scope, ...]
    head_count_kv: tuple[int, ...]
    expert_count: int = 0
    expert_used_count: int = 0


@dataclass(frozen=True)
class Tokenizer:
    """How the family's tokenizer is written: `kind` picks the writer.

    `pre` is llama.cpp's name of the pre-tokenizer and `pattern` the regular expression it stands
    for; `user_defined` are tokens always rendered; `has_scores` says whether the (meaningless)
    scores are written; `forced` are `tokenizer.ggml.*` flags set whatever the files say.
    """

    kind: str
    model: str
    pre: str = ""
    pattern: str = ""
    user_defined: frozenset[str] = frozenset()
    has_scores: bool = False
    forced: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class WithoutExperts:
    """How the experts of a family's layers, which stand beside an MLP, are left out.

    Rows under `feature` go, and the configuration gets `config`'s values. `folds` are pairs of
    layer sources (matrix, norm): a norm that goes with the experts, and whose weights have to be
    multiplied into the rows of a matrix that stays.
    """

    feature: str
    config: Config
    folds: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Family:
    """Everything that moequant knows of a model family.

    `model_types` are config.json's. `first`, `layer` and `last` are the rows in file order.
    `left_out` are beginnings of names (without "model.") that are knowingly not exported.
    `refuse` lists what in a configuration llama.cpp could not run as it is meant. `layout` gets
    the configuration and the checkpoint's names without prefix. `without_experts` is None where
    experts are the layers' only MLP, or where there are none.
    """

    architecture: str
    model_types: tuple[str, ...]
    first: tuple[Row, ...]
    layer: tuple[Row, ...]
    last: tuple[Row, ...]
    keys: tuple[Key, ...]
    tokenizer: Tokenizer
    refuse: Callable[[Config], list[str]]
    layout: Callable[[Config, Collection[str]], Layout]
    config_of: Callable[[FileKeys], dict[str, Any]]
    left_out: tuple[str, ...] = ()
    explain: Mapping[str, str] = field(default_factory=dict)
    without_experts: WithoutExperts | None = None

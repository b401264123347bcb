"""What a GGUF file tells of its model: keys by type, shapes, and the values of small tensors.

Owns: `FileKeys`, from which a family's `config_of` makes a configuration, and the fields that every
family has. Leaves out: what is special to one family (its file).

GGUF keeps floats in 32 bits. They are given back as the shortest decimal that rounds to the same 32
bits, so that an epsilon of 1e-6 is 1e-6 again and not 9.99999997e-07.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moequant.errors import GGUFError

Shapes = Mapping[str, tuple[int, ...]]
_YARN = {  # GGUF's key after rope.scaling. → rope_parameters' name
    "original_context_length": "original_max_position_embeddings",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_ext_factor": "extrapolation_factor",
}


@dataclass(frozen=True)
class FileKeys:
    """A file's keys without `{arch}.`, and its tensors' shapes with banks under one name.

    `origin` is the file's path, for errors. `values` reads a tensor of floats.
    """

    origin: str
    architecture: str
    metadata: Mapping[str, Any]
    shapes: Shapes
    values: Callable[[str], npt.NDArray[np.float32]]

    def has(self, key: str) -> bool:
        """Whether the file has `{arch}.{key}`."""
        return f"{self.architecture}.{key}" in self.metadata

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number that is not negative; GGUFError if it is none, or missing without default.

        Where each layer has its own, they have to be the same; 0 stands for none and is skipped.
        """
        value = self._value(key, default)
        values = set(value) - {0} if isinstance(value, list) else {value}
        if len(values) > 1 or not all(type(v) is int and v >= 0 for v in values):
            raise self._wrong(key, value, "one count")
        return next(iter(values), 0)

    def counts(self, key: str, layers: int) -> list[int]:
        """One count per layer, from a list of them or a single one for all."""
        value = self._value(key, None)
        values = value if isinstance(value, list) else [value] * layers
        if len(values) < layers or not all(type(v) is int and v >= 0 for v in values):
            raise self._wrong(key, value, f"a count, or one for each of {layers} layers")
        return values[:layers]

    def flags(self, key: str, layers: int) -> list[bool]:
        """One truth value per layer."""
        value = self._value(key, None)
        if not isinstance(value, list) or len(value) < layers:
            raise self._wrong(key, value, f"a flag for each of {layers} layers")
        if not all(v in (0, 1) for v in value):
            raise self._wrong(key, value, "true and false")
        return [bool(v) for v in value[:layers]]

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, as the shortest decimal that its 32 bits stand for."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not np.isfinite(value):
            raise self._wrong(key, value, "a number")
        return float(str(np.float32(value)))

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def _value(self, key: str, default: Any) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def _wrong(self, key: str, value: Any, expected: str) -> GGUFError:
        name = f"{self.architecture}.{key}"
        if value is None:
            return GGUFError(f"{self.origin}: the key {name} is missing.")
        return GGUFError(f"{self.origin}: {name} is {value!r:.80}, not {expected}.")


def common_fields(keys: FileKeys) -> dict[str, Any]:
    """The configuration's fields that have the same name and meaning in every family."""
    vocabulary = keys.shapes.get("token_embd.weight")
    if vocabulary is None:
        raise GGUFError(f"{keys.origin}: the tensor token_embd.weight is missing.")
    layers = keys.count("block_count")
    if not layers:
        raise GGUFError(f"{keys.origin}: {keys.architecture}.block_count is 0.")
    return {
        "vocab_size": vocabulary[0],
        "num_hidden_layers": layers,
        "max_position_embeddings": keys.count("context_length"),
        "hidden_size": keys.count("embedding_length"),
        "num_attention_heads": keys.count("attention.head_count"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in keys.shapes,
    }


def expert_width(keys: FileKeys) -> int:
    """Inner size of an expert: the key, or what the tensors have where it is not written."""
    stacks = (shape for name, shape in keys.shapes.items() if ".ffn_down_exps.weight" in name)
    width = keys.count("expert_feed_forward_length", 0)
    return width or next((shape[-1] for shape in stacks), 0)


def rope_parameters(keys: FileKeys) -> dict[str, Any]:
    """Rotary parameters of a model with one kind of layer; scaling linear or by YaRN."""
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": keys.number("rope.freq_base", 10000.0),
    }
    kind = keys.text("rope.scaling.type", "none")
    if kind == "none":
        return parameters
    parameters |= {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    if kind != "yarn":
        return parameters
    for key, name in _YARN.items():
        if keys.has(f"rope.scaling.{key}"):
            parameters[name] = keys.number(f"rope.scaling.{key}")
    length = "original_max_position_embeddings"
    parameters[length] = int(parameters.get(length, keys.count("context_length")))
    return parameters

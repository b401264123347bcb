"""Checkpoints: a local folder or a Hugging Face id, checked whole, then read tensor by tensor.

Owns: finding `config.json`, the index and the shards; checking every safetensors header before any
weight is read; reading a tensor, or some rows of one, without loading its shard; refusing pickle.
Leaves out: what the tensors mean (`architectures/`) and any change of dtype.
"""

from moequant.checkpoint.finite import check_finite
from moequant.checkpoint.header import TensorInfo
from moequant.checkpoint.reader import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "check_finite", "open_checkpoint"]

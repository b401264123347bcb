"""What all block encoders share: the shape of a codec, exact sums, and bytes.

Owns: `Codec` and `Scales`, order-deterministic sums over a block, fp16 fields, bit packing.
Leaves out: any one type's layout or search, chunking and threads (`moequant.quants`).

Every function sees whole blocks and treats each alike, so that a block's bytes depend on nothing
but that block and its weights. That rules out `sum`, `mean`, `matmul` and the fused `addcmul`
family over values: torch picks their order of additions, or their use of fused multiply-add, by
shape and alignment. Searches therefore hold values as columns (`as_columns`: a block's values
down, blocks across) and add with `column_sum`, which is elementwise, vectorised over blocks and
always in one order.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FP16_MAX = 65504.0
SCRATCH_VALUES = 1 << 20

_thread = threading.local()


@dataclass(frozen=True)
class Scales:
    """Scales of n blocks, as the format stores them; a value is `step * level + offset`.

    `step` and `offset` are float32 [n, groups], decoded from the stored fields (group g covers
    values g*size/groups onwards of the block); `offset` is None where the type has none. For a
    type with a codebook, `level` stands for the codebook's entry. `stored` holds the fields
    themselves, in the order that the type's `pack` wants them.
    """

    step: Tensor
    offset: Tensor | None
    stored: tuple[Tensor, ...]


@dataclass(frozen=True)
class Codec:
    """Encoder and decoder of one tensor type, over n independent blocks.

    fit(x f32 [n, block_size], weights f32 like x | None) -> Scales
    round(x f32 [n, block_size], Scales) -> levels f32 [n, block_size], whole numbers from 0 up
    pack(levels, Scales) -> uint8 [n, type_size]
    decode(uint8 [n, type_size]) -> f32 [n, block_size], bit for bit what ggml decodes

    Levels are float because packing them in float, before the one conversion to bytes, is twice
    as fast. `limit` is the largest |x| that is sure to fit the type's scale fields. `weighted` is
    False where weights make no difference. Weights are finite and >= 0; a block's may all be zero.
    """

    fit: Callable[[Tensor, Tensor | None], Scales]
    round: Callable[[Tensor, Scales], Tensor]
    pack: Callable[[Tensor, Scales], Tensor]
    decode: Callable[[Tensor], Tensor]
    limit: float
    weighted: bool = True

    def encode(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Fit, round, pack: float32 [n, block_size] to uint8 [n, type_size]."""
        scales = self.fit(x, weights)
        return self.pack(self.round(x, scales), scales)


def as_columns(x: Tensor, size: int, name: str) -> Tensor:
    """[n, k*size] to [size, n*k], one column per group of `size` values, in scratch memory."""
    groups = x.reshape(-1, size)
    return scratch(name, x, size, len(groups)).copy_(groups.t())


def scratch(name: str, like: Tensor, *shape: int) -> Tensor:
    """Uninitialised float32 memory that this thread's next call with the same name overwrites.

    For the large temporaries of a search: malloc gives their size back to the system each time
    and gets it anew as fresh pages, which costs more than the arithmetic. CUDA's allocator does
    not, nor are chunks beyond SCRATCH_VALUES kept.
    """
    size = math.prod(shape)
    if like.device.type != "cpu" or size > SCRATCH_VALUES:
        return like.new_empty(shape)
    kept: dict[str, Tensor] = _thread.__dict__
    if name not in kept or kept[name].numel() < size:
        kept[name] = torch.empty(size)
    return kept[name][:size].view(shape)


def column_sum(x: Tensor) -> Tensor:
    """Sum over axis 0 (a power of two long) by halving: always the same order of additions."""
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        x = x[:half] + x[half:]
    return x[0]


def column_sum_(x: Tensor) -> Tensor:
    """`column_sum` that overwrites x and returns a view of its first row; same result."""
    rows = x.shape[0]
    while rows > 1:
        rows //= 2
        x[:rows].add_(x[rows : 2 * rows])  # not +=, which would copy the result onto itself
    return x[0]


def first_largest(values: Tensor) -> Tensor:
    """Index of the largest over axis 0, the first of equals: argmax, ten times faster here."""
    largest = values.amax(0)
    choice = torch.zeros_like(largest, dtype=torch.int64)
    for index in range(len(values) - 1, 0, -1):
        choice.masked_fill_(values[index] == largest, index)
    return choice.masked_fill_(values[0] == largest, 0)


def through_fp16(x: Tensor) -> Tensor:
    """Float32 rounded to the nearest fp16, saturated at ±65504 instead of becoming infinite.

    Never -0: which zero a maximum returns depends on how torch cut the work.
    """
    return x.clamp(-FP16_MAX, FP16_MAX).half().float().add_(0.0)


def fp16_field(x: Tensor) -> Tensor:
    """Float32 [n] that fp16 holds exactly, to its little-endian bytes, uint8 [n, 2]."""
    return (x.half() + 0.0).unsqueeze(-1).view(torch.uint8)


def read_fp16(field: Tensor) -> Tensor:
    """Bytes uint8 [n, 2] to float32 [n, 1]."""
    return field.contiguous().view(torch.float16).float()


def safe_inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0 or so small that 1/x would be infinite."""
    return x.reciprocal().nan_to_num_(0.0, 0.0, 0.0)


def round_affine(x: Tensor, scales: Scales, top: int) -> Tensor:
    """Nearest level 0..top to (x - offset)/step, float32 like x [n, block_size]."""
    groups = x.view(*scales.step.shape, -1)
    levels = groups if scales.offset is None else groups - scales.offset.unsqueeze(-1)
    levels = levels * safe_inverse(scales.step).unsqueeze(-1)
    return levels.round_().clamp_(0, top).view_as(x)


def to_bytes(whole: Tensor) -> Tensor:
    """Float32 whole numbers 0..255 to uint8. Torch's own float to uint8 is seven times slower."""
    return (whole - 128).to(torch.int8).view(torch.uint8) ^ 128


def pack_bits(flags: Tensor) -> Tensor:
    """bool [n, 8m] to uint8 [n, m], the first flag in the lowest bit."""
    # One multiplication gathers the eight bytes' lowest bits into the topmost byte.
    words = flags.contiguous().view(torch.uint8).view(torch.int64)
    return ((words * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """uint8 [n, m] to uint8 [n, 8m] of 0 and 1, the lowest bit first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1)

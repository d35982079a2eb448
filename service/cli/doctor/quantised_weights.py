"""Quantised forms of a model's matrices, in the formats of AWQ, GPTQ, fp8 and compressed-tensors.

Values are rounded to the nearest step of their group. This is no way to quantise a model well: a
trial needs weights in a format, and the exact values that they stand for.

The formats are those of the files that the projects AutoAWQ, GPTQModel and compressed-tensors
write, and for fp8 those of DeepSeek-V3 (blocks) and AutoFP8 (whole matrices).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

METHODS = ("awq", "gptq", "fp8", "compressed-tensors")
# The place of each 4-bit value within 32 bits, in files of AWQ.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# The largest finite value of float8_e4m3fn.
_FP8_MAX = 448.0
_GROUPS = 128
# Small matrices that checkpoints leave as they are: gates of mixtures.
_GATES = re.compile(r"(^|\.)(gate|router|shared_expert_gate|wg)\.weight$")

Quantised = tuple[dict[str, "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class QuantizedForm:
    """The form of quantised matrices.

    Attributes:
        kind: `awq`, `gptq`, `fp8`, `fp8_block`, `pack`, `int8` or `float8`; the last three are
            formats of compressed-tensors.
        bits: Bits of a value.
        group: Values along a row that share a scale; the whole row where it is -1.
        block: Rows and columns of a block, for `fp8_block`.
        zero_points: Whether a group has a zero point of its own.
        channels: Whether each row has a scale of its own, instead of the matrix.
        static: Whether activations have a stored scale.
        kept: Parts of the names of matrices that are not quantised; with `re:`, expressions.
    """

    kind: str
    bits: int = 8
    group: int = -1
    block: tuple[int, int] = (1, 1)
    zero_points: bool = False
    channels: bool = False
    static: bool = False
    kept: tuple[str, ...] = ()

    @property
    def multiple(self) -> int:
        """The number that the sizes of matrices must be multiples of."""
        return math.lcm(_GROUPS, self.group if self.group > 0 else 1, *self.block)

    @property
    def rounds_activations(self) -> bool:
        """Whether kernels round activations too, so that answers are less exact."""
        return self.kind in ("fp8", "fp8_block", "int8", "float8")

    def takes(self, name: str, weight: torch.Tensor) -> bool:
        """Return whether a matrix of a model is quantised."""
        if weight.dim() != 2 or ".layers." not in name or not name.endswith(".weight"):
            return False
        if _GATES.search(name) or "norm" in name:
            return False
        module = name.removesuffix(".weight")
        return not any(_matches(kept, module) for kept in self.kept)

    def quantise(self, name: str, weight: torch.Tensor) -> Quantised:
        """Quantise one matrix.

        Args:
            name: The name of its weight.
            weight: The matrix, (out, in).

        Returns:
            The stored tensors by name, and the exact values, float32 (out, in).

        Raises:
            ValueError: Its sizes do not go into groups or blocks.
        """
        out, into = weight.shape
        rows, columns = self.block if self.kind == "fp8_block" else (32, max(self.group, 32))
        if out % rows or into % columns:
            raise ValueError(f"{name} is {out} × {into}, and a group of scales {rows} × {columns}")
        stored, values = _KINDS[self.kind](self, weight.float())
        module = name.removesuffix(".weight")
        return {f"{module}.{part}": tensor for part, tensor in stored.items()}, values


def form_of(config: Mapping[str, Any]) -> QuantizedForm | None:
    """Return the form of the weights that a `config.json` describes; None where it has none.

    Raises:
        ValueError: This module does not make weights of that form.
    """
    given = config.get("quantization_config")
    if not isinstance(given, Mapping):
        return None
    method = given.get("quant_method", "unknown")
    match method:
        case "awq":
            if given.get("bits", 4) != 4 or given.get("version", "gemm") != "gemm":
                raise _unknown_error(given)
            kept = given.get("modules_to_not_convert") or ()
            zeros = bool(given.get("zero_point", True))
            return QuantizedForm("awq", 4, _group(given), zero_points=zeros, kept=tuple(kept))
        case "gptq":
            if given.get("bits") not in (4, 8) or not given.get("sym", True) or _by_order(given):
                raise _unknown_error(given)
            if given.get("dynamic") or given.get("lm_head"):
                raise _unknown_error(given)
            return QuantizedForm("gptq", int(given["bits"]), _group(given))
        case "fp8":
            kept = given.get("modules_to_not_convert") or given.get("ignored_layers") or ()
            block = given.get("weight_block_size")
            static = given.get("activation_scheme", "dynamic") == "static"
            if block is None:
                return QuantizedForm("fp8", static=static, kept=tuple(kept))
            rows, columns = (int(size) for size in block)
            return QuantizedForm("fp8_block", block=(rows, columns), kept=tuple(kept))
        case "compressed-tensors":
            return _compressed_form(given)
    raise _unknown_error(given)


def _compressed_form(given: Mapping[str, Any]) -> QuantizedForm:
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise _unknown_error(given)
    (group,) = groups.values()
    weights, activations = group.get("weights") or {}, group.get("input_activations")
    format_ = group.get("format") or given.get("format")
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if not weights.get("symmetric", True) or group.get("targets") != ["Linear"]:
        raise _unknown_error(given)
    if activations is not None and not activations.get("dynamic"):
        raise _unknown_error(given)
    kept = tuple(given.get("ignore") or ())
    channels = strategy == "channel"
    if (
        format_ == "pack-quantized"
        and bits in (4, 8)
        and activations is None
        and not _by_order(weights)
    ):
        size = int(weights.get("group_size") or -1)
        return QuantizedForm("pack", int(bits), -1 if channels else size, kept=kept)
    if format_ == "int-quantized" and bits == 8 and strategy in ("channel", "tensor"):
        return QuantizedForm("int8", channels=channels, kept=kept)
    if format_ == "float-quantized" and bits == 8 and strategy in ("channel", "tensor"):
        return QuantizedForm("float8", channels=channels, kept=kept)
    raise _unknown_error(given)


def _unknown_error(given: Mapping[str, Any]) -> ValueError:
    method = given.get("quant_method", "unknown")
    if method in METHODS:
        return ValueError(f"this release makes no random weights of this form of {method}")
    return ValueError(f"this release makes no random weights of {method}")


def _group(given: Mapping[str, Any]) -> int:
    return int(given.get("group_size", given.get("q_group_size", _GROUPS)))


def _by_order(given: Mapping[str, Any]) -> bool:
    """Whether columns are ordered by activation, which each model does in its own way."""
    return bool(given.get("desc_act") or given.get("actorder"))


def _matches(kept: str, module: str) -> bool:
    if kept.startswith("re:"):
        return re.match(kept.removeprefix("re:"), module) is not None
    return kept in module


# --- the formats


def _awq(form: QuantizedForm, weight: torch.Tensor) -> Quantised:
    import torch

    grouped = _grouped(weight, form.group)
    if form.zero_points:
        low = grouped.amin(-1, keepdim=True).clamp(max=0)
        high = grouped.amax(-1, keepdim=True).clamp(min=0)
        scale = _half((high - low) / 15)
        zero = (-low / scale).round().clamp(0, 15)
    else:
        scale = _half(grouped.abs().amax(-1, keepdim=True) / 7)
        zero = torch.full_like(scale, 8)
    steps = ((grouped / scale).round() + zero).clamp(0, 15)
    values = ((steps - zero) * scale).reshape(weight.shape)
    order = torch.tensor(_AWQ_ORDER)

    def packed(rows: torch.Tensor) -> torch.Tensor:
        """Pack the last dimension in AWQ's order."""
        eights = rows.reshape(*rows.shape[:-1], -1, 8)[..., order]
        return _pack(eights.reshape(rows.shape), 4, -1)

    stored = {
        "qweight": packed(steps.reshape(weight.shape).T),
        "scales": scale.squeeze(-1).T.contiguous().half(),
    }
    if form.zero_points:
        stored["qzeros"] = packed(zero.squeeze(-1).T)
    return stored, values


def _gptq(form: QuantizedForm, weight: torch.Tensor) -> Quantised:
    import torch

    steps, scale, values = _symmetric(weight, form.bits, form.group)
    # Zero points are stored less one.
    zero = torch.full_like(scale.T, 2 ** (form.bits - 1) - 1)
    groups = scale.shape[1]
    stored = {
        "qweight": _pack((steps + 2 ** (form.bits - 1)).T, form.bits, 0),
        "scales": scale.T.contiguous().half(),
        "qzeros": _pack(zero, form.bits, -1),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // (weight.shape[1] // groups),
    }
    return stored, values


def _packed(form: QuantizedForm, weight: torch.Tensor) -> Quantised:
    import torch

    steps, scale, values = _symmetric(weight, form.bits, form.group)
    stored = {
        "weight_packed": _pack(steps + 2 ** (form.bits - 1), form.bits, -1),
        "weight_scale": scale.half(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    return stored, values


def _int8(form: QuantizedForm, weight: torch.Tensor) -> Quantised:
    import torch

    scale = _largest(weight, form.channels) / 127
    steps = (weight / scale).round().clamp(-128, 127)
    return {"weight": steps.to(torch.int8), "weight_scale": _stored(scale)}, steps * scale


def _fp8(form: QuantizedForm, weight: torch.Tensor) -> Quantised:
    import torch

    scale = _largest(weight, form.channels) / _FP8_MAX
    steps = (weight / scale).to(torch.float8_e4m3fn)
    stored = {"weight": steps, "weight_scale": _stored(scale)}
    if form.static:
        # Larger than any activation of a random model with layers of norms.
        stored["input_scale"] = torch.tensor(32.0 / _FP8_MAX)
    return stored, steps.float() * scale


def _fp8_block(form: QuantizedForm, weight: torch.Tensor) -> Quantised:
    import torch

    rows, columns = form.block
    out, into = weight.shape
    blocks = weight.reshape(out // rows, rows, into // columns, columns)
    scale = blocks.abs().amax((1, 3), keepdim=True) / _FP8_MAX
    steps = (blocks / scale).to(torch.float8_e4m3fn)
    scales = scale[:, 0, :, 0].contiguous()
    stored = {"weight": steps.reshape(out, into), "weight_scale_inv": scales}
    return stored, (steps.float() * scale).reshape(out, into)


_KINDS: dict[str, Callable[[QuantizedForm, torch.Tensor], Quantised]] = {
    "awq": _awq,
    "gptq": _gptq,
    "pack": _packed,
    "int8": _int8,
    "float8": _fp8,
    "fp8": _fp8,
    "fp8_block": _fp8_block,
}


def _grouped(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Reshape a matrix to (out, groups, values of a group)."""
    out, into = weight.shape
    return weight.reshape(out, -1, group if group > 0 else into)


def _symmetric(
    weight: torch.Tensor, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return signed steps (out, in), scales (out, groups), and the values that they stand for."""
    grouped = _grouped(weight, group)
    most = 2 ** (bits - 1) - 1
    scale = _half(grouped.abs().amax(-1, keepdim=True) / most)
    steps = (grouped / scale).round().clamp(-most - 1, most)
    values = (steps * scale).reshape(weight.shape)
    return steps.reshape(weight.shape), scale.squeeze(-1), values


def _half(scale: torch.Tensor) -> torch.Tensor:
    """Round scales to values that float16 and bfloat16 both have."""
    return scale.bfloat16().half().float().clamp(min=2.0**-14)


def _largest(weight: torch.Tensor, by_row: bool) -> torch.Tensor:
    found = weight.abs().amax(-1, keepdim=True) if by_row else weight.abs().amax()
    return found.clamp(min=2.0**-14)


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """Return a scale as files have it: one for each row, (out, 1), or of the matrix, (1,)."""
    return scale if scale.dim() else scale.reshape(1)


def _pack(steps: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Pack unsigned steps into int32 along a dimension, the first into the lowest bits."""
    import torch

    moved = steps.to(torch.int64).movedim(dim, -1)
    each = 32 // bits
    parts = moved.reshape(*moved.shape[:-1], -1, each)
    shifts = torch.arange(each) * bits
    words = (parts << shifts).sum(-1)
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed.movedim(-1, dim).contiguous()

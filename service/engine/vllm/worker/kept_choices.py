"""Kernels of routed experts that compute only the kept choices of a gate.

A gate's choice has the same number of places for every token. A rule that keeps fewer experts for
some tokens gives the other places the weight 0, and vLLM's kernels compute them all the same. The
callables here stand in front of a kernel's `apply` and take these places out of its work.

vLLM's CPU kernel corrupts memory where an id is -1, so that places can't be marked there. Places
that no token of a step uses are cut off. Of what is left, the kept choices become a batch of their
own, in which each token has one expert, and the outputs are summed by token. One call for each
number of kept experts was measured, too: experts that several calls need are packed and read once
for each of them, and it was slower than one call at every size. On a GPU, where shapes must not
depend on data, the places name one expert more than there are, which vLLM's expert map leaves
without a place on the device, as it does with the experts of other ranks. The kernels skip these.

The part for a GPU was written by reading vLLM's sources. It was run only on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# In a smaller step a dropped choice costs next to nothing, because it names an expert whose weights
# are read anyhow, so that even asking which choices are dropped is not worth it.
_LEAST_TO_CUT = 64
# A batch of kept choices costs more than it saves below so many places, and where fewer than this
# part of them is dropped. An expert with few tokens costs the reading of its weights, which is not
# saved by dropping some of its tokens, so that more must be dropped there (`loadtests.moe`).
_LEAST_PLACES = 128
_LEAST_DROPPED, _LEAST_DROPPED_OF_FEW = 1 / 8, 3 / 8
_FEW_FOR_EXPERT = 32
# vLLM's Triton kernel takes tokens one by one, without sorting them by expert, where there are so
# many times as many experts as places.
_EXPERTS_FOR_PLACE = 4
# The kernels on a GPU that skip what the expert map leaves out, in their products and in the sum.
_SKIPPING = ("TritonExperts",)


# The method by which a kernel of vLLM computes routed experts. It fills its argument `output`.
Apply = Callable[..., Any]


class CpuKeptChoices:
    """Computes the kept choices with a kernel of vLLM's CPU build.

    The result equals the kernel's own bit for bit, except where tokens of one step keep different
    numbers of experts and are computed as a batch of choices. Each expert's part is then rounded to
    the model's dtype before the sum, as in vLLM's Triton kernel: by at most 2^-24 of its size in
    float32, and 2^-9 in bfloat16.

    Args:
        apply: The kernel's own method.
        experts: The number of routed experts of the layer.
    """

    def __init__(self, apply: Apply, experts: int) -> None:
        self._apply = apply
        self._experts = experts

    def __call__(
        self,
        *,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        **rest: Any,
    ) -> Any:
        """Compute the routed experts of T tokens.

        Args:
            output: The result, (T, hidden).
            hidden_states: The input, (T, hidden).
            topk_weights: The weights of the choices, (T, places). A weight of 0 drops its choice.
            topk_ids: The chosen experts, (T, places).
            rest: The other arguments of the kernel.
        """

        def compute(out: torch.Tensor, rows: torch.Tensor, weights: Any, ids: Any) -> Any:
            return self._apply(
                output=out,
                hidden_states=rows,
                topk_weights=weights,
                topk_ids=ids,
                **rest,
            )

        # Weights on the input exist for one place only, and scales belong to rows of the input.
        if rest.get("apply_router_weight_on_input") or rest.get("a1q_scale") is not None:
            return compute(output, hidden_states, topk_weights, topk_ids)
        if topk_weights.numel() < _LEAST_TO_CUT:
            return compute(output, hidden_states, topk_weights, topk_ids)
        kept = topk_weights.numpy() != 0
        counts = kept.sum(axis=0).tolist()
        used = [place for place, count in enumerate(counts) if count]
        if not used:
            return output.zero_()
        if len(used) < len(counts):
            # Rules give the weight 0 to the last places, but for a boost of 0.
            front = used[-1] < len(used)
            places: Any = slice(len(used)) if front else used
            topk_weights = topk_weights[:, places].contiguous()
            topk_ids = topk_ids[:, places].contiguous()
        count = sum(counts)
        if not self._pays(topk_weights.numel(), count):
            return compute(output, hidden_states, topk_weights, topk_ids)
        # By place, so that the first choices, which nearly every token keeps, come first.
        place, token = torch.from_numpy(kept[:, used].T).nonzero(as_tuple=True)
        parts = torch.empty((count, output.shape[1]), dtype=output.dtype, device=output.device)
        compute(
            parts,
            hidden_states[token],
            topk_weights[token, place].unsqueeze(1),
            topk_ids[token, place].unsqueeze(1),
        )
        tokens = len(output)
        sums = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
        begin = tokens if counts[used[0]] == tokens else 0
        if begin:
            sums.copy_(parts[:begin])
        sums.index_add_(0, token[begin:], parts[begin:].float())
        return output.copy_(sums)

    def _pays(self, places: int, kept: int) -> bool:
        """Return whether a batch of kept choices costs less than all places of a step."""
        few = places < _FEW_FOR_EXPERT * self._experts
        least = _LEAST_DROPPED_OF_FEW if few else _LEAST_DROPPED
        return places >= _LEAST_PLACES and places - kept >= places * least


class MappedKeptChoices:
    """Computes the kept choices with a kernel that skips what vLLM's expert map leaves out.

    All shapes are fixed and nothing waits for the device, so that graphs can capture it.

    Args:
        apply: The kernel's own method.
        experts: The number of routed experts E of the layer, on all ranks.
        device: The device of the kernel.
        unsorted_steps: Whether the kernel takes small steps without sorting their tokens. It does
            so without an expert map only, and writes zeros where an id is -1.
    """

    def __init__(
        self, apply: Apply, experts: int, device: torch.device, *, unsorted_steps: bool = False
    ) -> None:
        self._apply = apply
        self._experts = experts
        self._unsorted_steps = unsorted_steps
        own = torch.arange(experts, dtype=torch.int32, device=device)
        self._hole = torch.full((1,), -1, dtype=torch.int32, device=device)
        self._whole = torch.cat((own, self._hole))

    def __call__(
        self,
        *,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        **rest: Any,
    ) -> Any:
        """Compute the routed experts of T tokens.

        Args:
            topk_weights: The weights of the choices, (T, places). A weight of 0 drops its choice.
            topk_ids: The chosen experts, (T, places). Rows that only fill up a batch have the id
                -1.
            global_num_experts: E.
            expert_map: The index on this rank of each expert, int32 (E,), or -1 for those of other
                ranks. None where this rank has all.
            rest: The other arguments of the kernel.
        """
        dropped = (topk_weights == 0) | (topk_ids < 0)
        is_small = topk_ids.numel() * _EXPERTS_FOR_PLACE <= self._experts
        if self._unsorted_steps and is_small and expert_map is None:
            return self._apply(
                topk_weights=topk_weights,
                topk_ids=torch.where(dropped, -1, topk_ids),
                global_num_experts=global_num_experts,
                expert_map=None,
                **rest,
            )
        whole = self._whole if expert_map is None else torch.cat((expert_map, self._hole))
        return self._apply(
            topk_weights=topk_weights,
            topk_ids=torch.where(dropped, self._experts, topk_ids),
            global_num_experts=global_num_experts + 1,
            expert_map=whole,
            **rest,
        )


def kept_choices(kernel: object | None, experts: int, device: torch.device) -> Apply | None:
    """Return what computes only the kept choices with a kernel; None where nothing can.

    Args:
        kernel: vLLM's object that computes the routed experts of one layer, if it is modular.
        experts: The number of routed experts of the layer, on all ranks.
        device: The device that it computes on.
    """
    if kernel is not None and device.type == "cpu":
        return CpuKeptChoices(_own_apply(kernel), experts)
    return mapped_kept_choices(kernel, experts, device)


def mapped_kept_choices(
    kernel: object | None, experts: int, device: torch.device
) -> MappedKeptChoices | None:
    """Return the same for a captured graph; None where the kernel skips nothing."""
    if kernel is not None and type(kernel).__name__ in _SKIPPING:
        quant = getattr(kernel, "quant_config", None)
        unsorted = quant is not None and not (quant.use_int8_w8a16 or quant.use_int4_w4a16)
        apply = _own_apply(kernel)
        return MappedKeptChoices(apply, experts, device, unsorted_steps=unsorted)
    return None


def _own_apply(kernel: object) -> Apply:
    own: Apply = type(kernel).apply.__get__(kernel)  # type: ignore[attr-defined]  # every kernel's
    return own


def replace_apply(kernel: object, apply: Apply) -> None:
    """Make a kernel compute by another function. This can't fail."""
    kernel.__dict__["apply"] = apply


def restore_apply(kernel: object) -> None:
    """Make a kernel compute by vLLM's own method again. This can't fail."""
    kernel.__dict__.pop("apply", None)


def computes_by(kernel: object, apply: Apply) -> bool:
    """Return whether a kernel computes by this function."""
    return kernel.__dict__.get("apply") is apply

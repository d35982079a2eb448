"""The model card of a mixture, with the numbers of its run."""

from __future__ import annotations

from router_models.moe.gate_fit import RIDGE, Statistics


def text(statistics: Statistics, *, top_k: int, hidden: int, layers: int) -> str:
    """Return the card. It names the origin of each expert instead of a licence of the weights."""
    rows = "\n".join(
        f"| {index} | {origin.name} | `{origin.weights}` | {origin.source} | {origin.licence} | "
        f"{origin.rows} | {origin.tokens:,} |"
        for index, origin in enumerate(statistics.origins)
    )
    return f"""---
base_model: {statistics.origins[0].weights}
tags: [mixtral, upcycled]
---

# One mixture of {len(statistics.experts)} dense experts

Made by `coe moe upcycle` without training: attention, embeddings and norms are those of
`{statistics.origins[0].weights}`; in each of {layers} layers the FFNs of the models below are
the experts, {top_k} of them for each token. The gates are a ridge regression (λ = {RIDGE:g},
columns normalised) from {hidden} hidden values to which expert's text a token is from.

| expert | name | FFNs of | texts for the gates | their licence | rows | tokens |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

No text is contained in these files: `upcycle/statistics.safetensors` holds means of hidden
states and of their products, from which gates are made again when an expert is added
(`coe moe upcycle --base THIS --experts NEW --out OTHER`). The weights are under the licences
of the models they were made of.
"""

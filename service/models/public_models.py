"""Public models that `coe init` proposes, with facts from their model cards.

The sizes are the sizes of the published safetensors files (bfloat16).
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 1_000_000_000


_CATEGORIES = {
    "general": ("general",),
    "code": ("coding", "shell-sql"),
    "math": ("math-word-problems", "symbolic-math"),
}


@dataclass(frozen=True, slots=True)
class PublicModel:
    """A model by its id on the hub (or a name of the built-in catalogue).

    `category` is the field that the model is made for.
    """

    source: str
    category: str
    licence: str
    parameters: float
    weight_bytes: int
    about: str

    @property
    def categories(self) -> tuple[str, ...]:
        """The general router's categories that it is the expert for."""
        return _CATEGORIES[self.category]


@dataclass(frozen=True, slots=True)
class Trio:
    """Models of one family and size: one model for each field."""

    name: str
    models: tuple[PublicModel, ...]
    context_tokens: int

    @property
    def largest_bytes(self) -> int:
        """Size of the largest model's published weights, in bytes."""
        return max(model.weight_bytes for model in self.models)

    @property
    def total_bytes(self) -> int:
        """Size of all published weights, in bytes."""
        return sum(model.weight_bytes for model in self.models)

    @property
    def parameters(self) -> float:
        """Number of parameters of the largest model."""
        return max(model.parameters for model in self.models)


def _qwen(size: str, parameters: float, weight_bytes: int, *, math: bool) -> Trio:
    def published(part: str, category: str, about: str) -> PublicModel:
        source = f"Qwen/Qwen2.5-{part}{size}-Instruct"
        return PublicModel(source, category, "Apache-2.0", parameters, weight_bytes, about)

    models = [published("", "general", "for anything"), published("Coder-", "code", "programs")]
    if math:
        models.append(published("Math-", "math", "mathematics, step by step"))
    # The mathematical models are trained for 4,096 tokens.
    return Trio(f"Qwen2.5 {size}", tuple(models), 4096)


# The largest models come first. The family's 3B and 72B are left out for their other licence.
TRIOS = (
    _qwen("32B", 32.8e9, int(65.6 * GB), math=False),
    _qwen("14B", 14.8e9, int(29.6 * GB), math=False),
    _qwen("7B", 7.62e9, int(15.3 * GB), math=True),
    _qwen("1.5B", 1.54e9, int(3.1 * GB), math=True),
    _qwen("0.5B", 0.49e9, int(1.0 * GB), math=False),
)

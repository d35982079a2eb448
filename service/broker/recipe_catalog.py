"""All recipes and their experts, as arrays. Immutable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from service.types import MAX_LATER, Recipe

Ints = NDArray[np.intp]


class RecipeCatalog:
    """The experts and recipes of one config, by index.

    With E experts and R recipes: `members` (R, M) and `later` (R, MAX_LATER) hold indices
    of experts, `E` where there is none. The first E recipes are the experts themselves. A
    recipe that recruits has no members until they are chosen for a prompt.
    """

    def __init__(self, experts: Sequence[str], recipes: Iterable[Recipe] = ()) -> None:
        """Index the recipes; each is kept once, and `recipes` may repeat singles.

        Raises ValueError if a recipe names an expert that is not in `experts`.
        """
        self.experts = tuple(experts)
        self.index = {name: i for i, name in enumerate(self.experts)}
        singles = [Recipe("single", (name,)) for name in self.experts]
        self.recipes = tuple(dict.fromkeys([*singles, *recipes]))
        self.recipe_index = {recipe: i for i, recipe in enumerate(self.recipes)}
        for recipe in self.recipes:
            unknown = [name for name in recipe.experts if name not in self.index]
            if unknown:
                raise ValueError(f"{recipe.name}: no expert {unknown[0]!r}")
        fixed = [() if recipe.recruitment else recipe.members for recipe in self.recipes]
        places = [recipe.recruitment.k for recipe in self.recipes if recipe.recruitment]
        width = max(*places, *map(len, fixed), 0)
        self.members = self._padded(fixed, width)
        self.later = self._padded([recipe.later for recipe in self.recipes], MAX_LATER)
        self.single = np.array([recipe.kind == "single" for recipe in self.recipes])
        # (R, E): whether the recipe needs the expert, for hard constraints.
        self.uses = np.zeros((len(self.recipes), len(self.experts)), dtype=bool)
        # (R, E): whether the recipe may recruit the expert.
        self.among = np.zeros_like(self.uses)
        # (R, E): the most calls of the expert in one request.
        self.most_calls = np.zeros(self.uses.shape)
        for i, recipe in enumerate(self.recipes):
            self.uses[i, [self.index[name] for name in recipe.required]] = True
            self.most_calls[i] = self.uses[i]
            if recipe.recruitment is not None:
                self.among[i, [self.index[name] for name in recipe.members]] = True
            if recipe.deliberation is not None:
                self.most_calls[i] *= 2 * recipe.deliberation.rounds
        self.deliberates = np.array([r.deliberation is not None for r in self.recipes])
        self.recruits = np.array([r.recruitment is not None for r in self.recipes])
        # Whether any recipe makes more calls than one of each expert.
        self.has_steps = bool(self.deliberates.any() or self.recruits.any())
        self.everything = np.arange(len(self.recipes))
        self.all_singles = self.everything[: len(self.experts)]

    def _padded(self, names: Sequence[Sequence[str]], width: int) -> Ints:
        table = np.full((len(names), width), len(self.experts), dtype=np.intp)
        for row, inner in enumerate(names):
            table[row, : len(inner)] = [self.index[name] for name in inner]
        return table

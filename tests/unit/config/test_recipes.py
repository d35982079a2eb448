"""Recipes of a config: what is refused, and what the broker gets."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from service.config import Config
from service.config.recipes import RecipeConfig

THREE = ["a", "b", "c"]


def parsed(recipes: dict[str, Any], **sections: Any) -> Config:
    return Config.model_validate(
        {
            "experts": {name: {"model": name} for name in "abcd"},
            "pools": {"cpu": {"engine": "simulated"}},
            "recipes": recipes,
            **sections,
        }
    )


def test_recipe_config_deliberation_without_settings_has_the_usual_ones() -> None:
    recipe = RecipeConfig.model_validate({"kind": "deliberate", "members": THREE}).recipe()
    assert recipe.deliberation is not None
    assert (recipe.steps, recipe.name) == (2, "deliberate([a, b, c])")
    assert recipe.required == recipe.experts == tuple(THREE)


def test_recipe_config_recruit_needs_its_aggregator_only() -> None:
    given = {"k": 2, "among": THREE, "aggregator": "d"}
    recipe = RecipeConfig.model_validate({"kind": "recruit", "recruit": given}).recipe()
    assert (recipe.required, recipe.experts) == (("d",), ("a", "b", "c", "d"))
    best = RecipeConfig.model_validate({"kind": "recruit", "recruit": {"k": 2, "among": THREE}})
    assert best.recipe().required == ()
    assert best.recipe().recruitment is not None
    assert best.recipe().recruitment.aggregator is None  # type: ignore[union-attr]
    # Keys that may not use all of them see no names.
    assert re.fullmatch(r"recruit\(2 of 3, [0-9a-f]{4} → d\)", recipe.name)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"kind": "deliberate", "members": ["a", "b"]}, "members: a deliberation needs at least 3"),
        ({"kind": "deliberate", "members": ["a", "b", "a"]}, "invalid recipe"),
        ({"kind": "deliberate", "members": THREE, "later": ["d"]}, "invalid recipe"),
        (
            {"kind": "vote", "members": THREE, "deliberate": {}},
            "deliberate: is for recipes of this kind, not for a vote",
        ),
        ({"kind": "recruit"}, "recruit: is needed"),
        (
            {"kind": "recruit", "members": ["a"], "recruit": {"k": 2, "among": THREE}},
            "members: a recruit has none",
        ),
        ({"kind": "recruit", "recruit": {"k": 4, "among": THREE}}, "k: 4 experts of 3 in among"),
        (
            {"kind": "recruit", "recruit": {"k": 2, "among": THREE, "prompt": "hm"}},
            r"prompt: lacks the placeholder \{answers\}",
        ),
        (
            {"kind": "deliberate", "members": THREE, "deliberate": {"review": "{answers} {x}"}},
            r"review: has no placeholder \{x\}",
        ),
        (
            {"kind": "deliberate", "members": THREE, "deliberate": {"revise": "{answer}"}},
            r"revise: lacks the placeholder \{corrections\}",
        ),
        (
            {"kind": "deliberate", "members": THREE, "deliberate": {"rounds": 4}},
            "less than or equal to 3",
        ),
        ({"kind": "cascade", "members": []}, "invalid recipe"),
    ],
)
def test_recipe_config_names_what_is_wrong(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RecipeConfig.model_validate(recipe)


@pytest.mark.parametrize(
    ("recipes", "sections", "message"),
    [
        ({"x": {"kind": "recruit", "recruit": {"k": 2, "among": ["a", "e"]}}}, {}, "no expert 'e'"),
        (
            {"x": {"kind": "recruit", "recruit": {"k": 2, "among": THREE, "aggregator": "e"}}},
            {},
            "no expert 'e'",
        ),
        (
            {
                "x": {"kind": "deliberate", "members": THREE},
                "y": {"kind": "deliberate", "members": THREE, "deliberate": {"gain": 0.5}},
            },
            {},
            "recipes.x: has the experts of recipes.y and other settings",
        ),
        (
            {"x": {"kind": "recruit", "recruit": {"k": 2, "among": THREE}}},
            {"savings": {"against": ["x"]}},
            "savings.against: 'x' recruits other experts",
        ),
    ],
)
def test_config_refuses_recipes_that_it_can_not_serve(
    recipes: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        parsed(recipes, **sections)

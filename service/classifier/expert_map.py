"""The expert map: expected quality and cost of every recipe for a prompt.

The matrix W, (categories, recipes), is fitted offline from recorded outcomes (`router_models`). Its
values are shrunk for categories with few rows. *Factors* add the difficulty of the individual
prompt. They are linear in the prompt's n-grams, and estimate which experts answer this prompt
correctly. V holds their loadings. With posterior p over categories and factors f, the quality of
recipe r is

    Q[r] = Σ_c p[c] · (W[c, r] + Σ_k f[k] · V[c, k, r])

The expected cost has the same form.

A category that is doubtful misleads. So there is a second estimate that uses no category, the
*direct* one: Q'[r] = d[r] + Σ_k f[k] · L[k, r], a ridge regression of the recipe's score on the
n-grams. The map is trusted with t = (max p)**trust_power, the direct estimate with the rest; with
too novel prompts the direct estimate alone counts. It ends at the recipe's mean on a prompt that
shares no n-gram with the fit.

The map is immutable. Online learning adds its corrections elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.classifier.classifier import Assessment
from service.classifier.router_artifact import Artifact
from service.errors import ArtifactError
from service.types import MAX_LATER, Recipe

Floats = NDArray[np.float64]

MAX_RECIPES = 256
MAX_TRUST_POWER = 64.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimates of every recipe for one prompt.

    Attributes:
        quality: (recipes,), expected quality in [0, 1].
        cost: (recipes,), expected cost of all calls, in the unit of the fit.
        reach: (recipes, MAX_LATER), probability that each later expert is called.
    """

    quality: Floats
    cost: Floats
    reach: Floats


@dataclass(frozen=True, slots=True)
class DirectEstimate:
    """Estimates for R recipes from F factors, without categories.

    Attributes:
        score: (R,), mean quality.
        cost: (R,), mean cost.
        reach: (R, MAX_LATER), mean probability that each later expert is called.
        score_slope: (F, R), loadings of the factors for quality.
        cost_slope: (F, R), loadings of the factors for cost.
    """

    score: Floats
    cost: Floats
    reach: Floats
    score_slope: Floats
    cost_slope: Floats

    def only(self, recipes: Sequence[int]) -> DirectEstimate:
        """Return the estimates of these recipes, in this order."""
        at = list(recipes)
        return DirectEstimate(
            self.score[at],
            self.cost[at],
            self.reach[at],
            self.score_slope[:, at],
            self.cost_slope[:, at],
        )


@dataclass(frozen=True, slots=True)
class RecordedTokens:
    """Mean tokens of the calls that a map was fitted on, for C categories and E experts.

    Attributes:
        experts: The experts.
        prompt: (C, E), tokens of the prompt as the expert counted it, its chat template included.
        answer: (C, E), tokens of the answer.
        added: (E,), tokens of the prompt beyond the gateway's estimate of its text.
    """

    experts: tuple[str, ...]
    prompt: Floats
    answer: Floats
    added: Floats

    def only(self, experts: Sequence[str]) -> RecordedTokens:
        """Return the tokens of these experts as far as they are known, in the known order."""
        at = [e for e, name in enumerate(self.experts) if name in experts]
        return RecordedTokens(
            tuple(self.experts[e] for e in at),
            self.prompt[:, at],
            self.answer[:, at],
            self.added[at],
        )

    def with_copies(self, copies: Mapping[str, str]) -> RecordedTokens:
        """Return the tokens with those of new experts, each with the figures of another one."""
        at = {name: self.experts.index(o) for name, o in copies.items() if o in self.experts}
        columns = [*range(len(self.experts)), *at.values()]
        return RecordedTokens(
            (*self.experts, *at),
            self.prompt[:, columns],
            self.answer[:, columns],
            self.added[columns],
        )


NOT_RECORDED = -(2**31)


@dataclass(frozen=True, slots=True)
class RecordedThinking:
    """Samples of the lengths of thinking that a map was fitted on, for C categories and E experts.

    Attributes:
        experts: The experts.
        samples: (K, C, E), tokens; −1−n where the thinking was cut at n, and `NOT_RECORDED` where
            too few lengths were.
    """

    experts: tuple[str, ...]
    samples: NDArray[np.int32]

    def only(self, experts: Sequence[str]) -> RecordedThinking:
        """Return the samples of these experts as far as they are known, in the known order."""
        at = [e for e, name in enumerate(self.experts) if name in experts]
        return RecordedThinking(tuple(self.experts[e] for e in at), self.samples[:, :, at])

    def with_copies(self, copies: Mapping[str, str]) -> RecordedThinking:
        """Return the samples with those of new experts, each with the samples of another one."""
        at = {name: self.experts.index(o) for name, o in copies.items() if o in self.experts}
        columns = [*range(len(self.experts)), *at.values()]
        return RecordedThinking((*self.experts, *at), self.samples[:, :, columns])


class ExpertMap:
    """The matrix W with its recipes, costs and factor loadings."""

    def __init__(
        self,
        *,
        categories: tuple[str, ...],
        recipes: tuple[Recipe, ...],
        prior: Floats,
        score: Floats,
        count: Floats,
        cost: Floats,
        reach: Floats,
        score_slope: Floats,
        cost_slope: Floats,
        max_novelty: float,
        direct: DirectEstimate | None = None,
        trust_power: float = 0.0,
        tokens: RecordedTokens | None = None,
        thinking: RecordedThinking | None = None,
    ) -> None:
        """Create a map for C categories, R recipes and F factors.

        Args:
            categories: Names of the categories.
            recipes: The recipes.
            prior: (C,), each category's share of all prompts.
            score: (C, R), expected quality.
            count: (C, R), number of rows in the fit.
            cost: (C, R), expected cost.
            reach: (C, R, MAX_LATER), probability that each later expert is called.
            score_slope: (C, F, R), loadings of the factors for quality.
            cost_slope: (C, F, R), loadings of the factors for cost.
            max_novelty: For prompts with more novelty the direct estimate alone counts.
            direct: The estimate without categories. Without one it is the mean over all categories.
            trust_power: How fast a doubtful category loses to the direct estimate; 0 is never.
            tokens: Recorded lengths of prompts and answers, where the outcomes have them.
            thinking: Recorded lengths of thinking, where the outcomes have them.
        """
        self.tokens = tokens
        self.thinking = thinking
        self.categories = categories
        self.recipes = recipes
        self.prior = prior
        self.score = score
        self.count = count
        self.cost = cost
        self.reach = reach
        self.max_novelty = max_novelty
        self.trust_power = trust_power
        factors = score_slope.shape[1]
        flat = (len(categories) * factors, len(recipes))
        self._slopes = np.concatenate(
            (score_slope.reshape(flat), cost_slope.reshape(flat)), axis=1
        ).astype(np.float32)
        self.direct = direct or DirectEstimate(
            prior @ score,
            prior @ cost,
            np.asarray(np.tensordot(prior, reach, axes=1), dtype=np.float64),
            np.zeros((factors, len(recipes))),
            np.zeros((factors, len(recipes))),
        )

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts of all recipes, in the order of their first recipe."""
        return tuple(dict.fromkeys(e for recipe in self.recipes for e in recipe.experts))

    @property
    def memory_bytes(self) -> int:
        """Size of the arrays in bytes."""
        direct = self.direct
        arrays = (
            *(self.score, self.count, self.cost, self.reach, self._slopes),
            *(direct.score, direct.cost, direct.reach, direct.score_slope, direct.cost_slope),
        )
        return sum(array.nbytes for array in arrays)

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> ExpertMap:
        """Create the map of an artifact.

        Raises:
            ArtifactError: The artifact can't be used.
        """
        section = artifact.section("map")
        try:
            categories = tuple(str(c) for c in artifact.section("classifier")["categories"])
            recipes = tuple(Recipe.from_json(r) for r in section["recipes"])
            factors = int(section["factors"])
            max_novelty = float(artifact.section("classifier")["thresholds"]["max_novelty"])
            trust_power = float(section.get("trust_power", 0.0))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{artifact.path}: manifest, map: {error!r}") from error
        if not 1 <= len(recipes) <= MAX_RECIPES or len(set(recipes)) != len(recipes):
            raise ArtifactError(
                f"{artifact.path}: manifest, map: 1..{MAX_RECIPES} distinct recipes are allowed, "
                f"found {len(recipes)}"
            )
        if not 0 <= trust_power <= MAX_TRUST_POWER:
            raise ArtifactError(
                f"{artifact.path}: manifest, map: trust_power must be 0..{MAX_TRUST_POWER:g}"
            )
        cells = (len(categories), len(recipes))

        def read(name: str, *shape: int) -> Floats:
            return artifact.tensor(f"map.{name}", shape).astype(np.float64)

        return cls(
            categories=categories,
            recipes=recipes,
            prior=read("prior", cells[0]),
            score=read("score", *cells),
            count=read("count", *cells),
            cost=read("cost", *cells),
            reach=read("reach", *cells, MAX_LATER),
            score_slope=read("score_slope", cells[0], factors, cells[1]),
            cost_slope=read("cost_slope", cells[0], factors, cells[1]),
            max_novelty=max_novelty,
            direct=DirectEstimate(
                score=read("direct_score", cells[1]),
                cost=read("direct_cost", cells[1]),
                reach=read("direct_reach", cells[1], MAX_LATER),
                score_slope=read("direct_score_slope", factors, cells[1]),
                cost_slope=read("direct_cost_slope", factors, cells[1]),
            )
            if "trust_power" in section
            else None,
            trust_power=trust_power,
            tokens=_tokens(artifact, len(categories)),
            thinking=_thinking(artifact, len(categories)),
        )

    def estimate(self, assessment: Assessment) -> Estimate:
        """Estimate quality, cost and reach of every recipe for one prompt.

        The categories count as far as they are trusted, and the direct estimate for the rest. Both
        are bounded before they are joined.
        """
        scores, direct = assessment.scores, self.direct
        p = np.asarray(scores.probabilities)
        factors = assessment.factors
        trust = 0.0 if scores.novelty > self.max_novelty else float(p.max()) ** self.trust_power
        both = np.concatenate((p @ self.score, p @ self.cost))
        if len(factors):
            both += (p[:, None] * factors).ravel().astype(np.float32) @ self._slopes
        count = len(self.recipes)
        quality, cost = np.clip(both[:count], 0.0, 1.0), np.maximum(both[count:], 0.0)
        own_quality = np.clip(direct.score + factors @ direct.score_slope, 0.0, 1.0)
        own_cost = np.maximum(direct.cost + factors @ direct.cost_slope, 0.0)
        reach = np.tensordot(p, self.reach, axes=1)
        return Estimate(
            quality=trust * quality + (1 - trust) * own_quality,
            cost=trust * cost + (1 - trust) * own_cost,
            reach=trust * reach + (1 - trust) * direct.reach,
        )

    def quality_by_category(self, factors: Floats) -> Floats:
        """The quality of every recipe were the category certain, (categories, recipes).

        Args:
            factors: (factors,), see `Assessment`.
        """
        if not len(factors):
            return self.score
        count = len(self.recipes)
        slopes = self._slopes.reshape(len(self.categories), len(factors), 2 * count)[..., :count]
        harder = np.tensordot(slopes, factors, axes=(1, 0))
        return np.asarray(np.clip(self.score + harder, 0.0, 1.0))

    def only(self, experts: Sequence[str], alone: Collection[str] = ()) -> ExpertMap:
        """Return the map of the recipes that use only these experts.

        Args:
            experts: The experts.
            alone: More names, which count alone, and in no recipe of several experts.

        Raises:
            ValueError: There is no such recipe.
        """
        allowed = set(experts)
        keep = [
            i
            for i, recipe in enumerate(self.recipes)
            if allowed.issuperset(recipe.experts)
            or (recipe.kind == "single" and recipe.members[0] in alone)
        ]
        if not keep:
            raise ValueError("no recipe of the map uses only the experts named")
        recipes = tuple(self.recipes[i] for i in keep)
        tokens = self.tokens and self.tokens.only(experts)
        thinking = self.thinking and self.thinking.only(experts)
        return self._taking(keep, recipes, tokens, thinking)

    def with_copies(self, copies: Mapping[str, str]) -> ExpertMap:
        """Return the map with more experts that have the figures of others.

        Args:
            copies: By new expert, the one whose figures it has. Those that the map does not know
                are left out.
        """
        single = {
            recipe.members[0]: i for i, recipe in enumerate(self.recipes) if recipe.kind == "single"
        }
        new = {
            name: single[other]
            for name, other in copies.items()
            if other in single and name not in single
        }
        if not new:
            return self
        recipes = (*self.recipes, *(Recipe("single", (name,)) for name in new))
        named = {name: copies[name] for name in new}
        return self._taking(
            [*range(len(self.recipes)), *new.values()],
            recipes,
            self.tokens and self.tokens.with_copies(named),
            self.thinking and self.thinking.with_copies(named),
        )

    def _taking(
        self,
        keep: list[int],
        recipes: tuple[Recipe, ...],
        tokens: RecordedTokens | None,
        thinking: RecordedThinking | None,
    ) -> ExpertMap:
        """Return a map with the figures of these columns, for `recipes`."""
        cells = len(self.categories)
        slopes = self._slopes.reshape(cells, -1, 2, len(self.recipes))[..., keep]
        return ExpertMap(
            categories=self.categories,
            recipes=recipes,
            prior=self.prior,
            score=self.score[:, keep],
            count=self.count[:, keep],
            cost=self.cost[:, keep],
            reach=self.reach[:, keep],
            score_slope=slopes[:, :, 0].astype(np.float64),
            cost_slope=slopes[:, :, 1].astype(np.float64),
            max_novelty=self.max_novelty,
            direct=self.direct.only(keep),
            trust_power=self.trust_power,
            tokens=tokens,
            thinking=thinking,
        )


def _tokens(artifact: Artifact, categories: int) -> RecordedTokens | None:
    """The recorded tokens of an artifact; None where it has none.

    Raises:
        ArtifactError: They have other shapes than the manifest says, or are no lengths.
    """
    section = artifact.section("map")
    if "token_experts" not in section:
        return None
    try:
        experts = tuple(str(name) for name in section["token_experts"])
    except TypeError as error:
        raise ArtifactError(f"{artifact.path}: manifest, map: {error!r}") from error
    cells = (categories, len(experts))
    found = RecordedTokens(
        experts,
        artifact.tensor("map.prompt_tokens", cells).astype(np.float64),
        artifact.tensor("map.answer_tokens", cells).astype(np.float64),
        artifact.tensor("map.added_tokens", (len(experts),)).astype(np.float64),
    )
    if min(found.prompt.min(initial=0), found.answer.min(initial=0)) < 0:
        raise ArtifactError(f"{artifact.path}: map: recorded tokens must be 0 or more")
    return found


def _thinking(artifact: Artifact, categories: int) -> RecordedThinking | None:
    """The recorded lengths of thinking of an artifact; None where it has none.

    Raises:
        ArtifactError: They have another shape than the manifest says.
    """
    section = artifact.section("map")
    if "thinking_experts" not in section:
        return None
    try:
        experts = tuple(str(name) for name in section["thinking_experts"])
        count = int(section["thinking_samples"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{artifact.path}: manifest, map: {error!r}") from error
    samples = artifact.tensor("map.thinking_tokens", (count, categories, len(experts)))
    return RecordedThinking(experts, samples.astype(np.int32))

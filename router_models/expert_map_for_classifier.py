"""Fits an expert map for the categories of a classifier that exists.

The outcomes may have other categories than the classifier, or none. A prompt counts in each of the
classifier's categories by the posterior that the classifier gives it, never by a name. The service
computes a recipe's quality as p · W, so W is fitted by least squares in the same form: ridge
regression of the scores on the posteriors, shrunk toward the recipe's overall mean. Where every
posterior is certain, this equals the shrunk means of `expert_map_fit`.

    python -m router_models.cli add-map --classifier A@1 --outcomes F --out B@1
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_models.composition.recipe_estimates import mixture
from router_models.expert_map_fit import select_recipes
from router_models.outcome_reader import (
    OutcomeError,
    Table,
    costs_of,
    read_outcomes,
    read_thinking,
    read_tokens,
)
from router_models.preset_choice import (
    Played,
    judge_own,
    own_to_json,
    play_choices,
    preset_text,
    presets_section,
)
from router_models.recipe_replay import RecipeResults, candidates, play
from router_models.router_fit import prompt_hashes
from service.broker.reference_cost import best_shares
from service.classifier.classifier import GENERAL, Classifier
from service.classifier.expert_map import NOT_RECORDED, RecordedThinking, RecordedTokens
from service.classifier.router_artifact import CARD, Artifact, load_artifact, save_artifact
from service.classifier.static_embedding_table import table_of
from service.config.router_presets import PresetsConfig
from service.http.token_usage import estimate_tokens
from service.types import MAX_LATER, Recipe

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]

# Pseudo-rows of the overall mean in each category, of which the rows choose one.
SHRINKAGES = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
FOLDS = 5
# The recipes of an artifact that are no single experts.
MOST_RECIPES = 24
# A category with less than this much of the rows has no evidence of its own.
LEAST_ROWS = 5.0
# A recipe of several experts has to beat its own experts by so many standard errors.
LEAST_ERRORS = 2.0
# Lengths of thinking that an artifact holds of an expert and a category, and the fewest recorded.
THINKING_SAMPLES = 64
FEWEST_THINKING = 20
PRESETS = {"auto:fast": "fast", "auto": "", "auto:best": "best"}


@dataclass(frozen=True, slots=True)
class PosteriorMap:
    """A map of R recipes over C categories.

    Attributes:
        recipes: The recipes.
        score: (C, R), expected quality in [0, 1].
        cost: (C, R), expected cost.
        reach: (C, R, MAX_LATER), probability that each later expert is called.
        count: (C, R), the rows that count in each cell: sums of posteriors.
        prior: (C,), the mean posterior.
        shrink_rows: The chosen shrinkage.
    """

    recipes: tuple[Recipe, ...]
    score: Floats
    cost: Floats
    reach: Floats
    count: Floats
    prior: Floats
    shrink_rows: float


@dataclass(frozen=True, slots=True)
class Gain:
    """What a preset gives on held-out prompts, beside always asking the best single expert.

    Attributes:
        preset: `auto:fast`, `auto` or `auto:best`.
        score: Mean score.
        lead: Mean score less the best single expert's.
        lead_se: Standard error of `lead`.
        cost: Mean cost as a share of the best single expert's.
        shares: Share of the prompts that each first expert answers.
    """

    preset: str
    score: float
    lead: float
    lead_se: float
    cost: float
    shares: Mapping[str, float]


def posteriors(classifier: Classifier, prompts: Sequence[str]) -> Floats:
    """The posterior on each prompt, (N, C); zeros where a prompt is too new to be classified."""
    found = np.zeros((len(prompts), len(classifier.labels)))
    for i, prompt in enumerate(prompts):
        reading = classifier.read(prompt)
        if reading.novelty <= classifier.max_novelty:
            found[i] = reading.posterior
    return found


def posterior_cells(values: Floats, posterior: Floats, shrink_rows: float) -> Floats:
    """Regress values on posteriors, shrunk toward each column's own mean.

    Args:
        values: (N, R); NaN where one is missing.
        posterior: (N, C).
        shrink_rows: Pseudo-rows of the mean in each category.

    Returns:
        (C, R). A column without any value gets 0.
    """
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    mean = filled.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    rest = np.where(known, filled - mean * posterior.sum(axis=1, keepdims=True), 0.0)
    ridge = shrink_rows * np.eye(posterior.shape[1])
    cells = np.zeros((posterior.shape[1], values.shape[1]))
    # Columns with the same rows share one factorisation.
    patterns, of = np.unique(known.T, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        at = np.flatnonzero(of.ravel() == number)
        part = posterior[pattern]
        cells[:, at] = np.linalg.solve(part.T @ part + ridge, part.T @ rest[np.ix_(pattern, at)])
    return np.asarray(mean + cells)


def recorded_tokens(
    table: Table, tokens: tuple[Floats, Floats], posterior: Floats, shrink_rows: float = 5.0
) -> RecordedTokens | None:
    """The mean tokens of each expert's calls by category; None where none are recorded.

    Args:
        table: The rows and the experts.
        tokens: Of each call's prompt and answer, both (N, E); NaN where they are not recorded.
        posterior: (N, C).
        shrink_rows: Pseudo-rows of an expert's mean in each category.
    """
    prompt, answer = tokens
    known = ~np.isnan(prompt) & ~np.isnan(answer)
    at = np.flatnonzero(known.any(axis=0))
    if not len(at):
        return None
    prompt, answer = (np.where(known, each, np.nan)[:, at] for each in (prompt, answer))
    estimated = np.array([1 + estimate_tokens(len(text.encode())) for text in table.prompts])
    return RecordedTokens(
        tuple(table.experts[e] for e in at),
        np.maximum(posterior_cells(prompt, posterior, shrink_rows), 0.0),
        np.maximum(posterior_cells(answer, posterior, shrink_rows), 0.0),
        np.nanmean(prompt - estimated[:, None], axis=0),
    )


def recorded_thinking(
    table: Table, thinking: tuple[Floats, NDArray[np.bool_]], posterior: Floats
) -> RecordedThinking | None:
    """Samples of each expert's lengths of thinking by category; None where none are recorded.

    A row counts for its likeliest category. The samples are evenly spaced among the lengths.

    Args:
        table: The rows and the experts.
        thinking: Tokens of each call's thinking, (N, E), NaN where they are not recorded; and
            whether it was cut, (N, E).
        posterior: (N, C).
    """
    tokens, cut = thinking
    at = np.flatnonzero((~np.isnan(tokens)).any(axis=0))
    if not len(at):
        return None
    category = np.where(posterior.any(axis=1), posterior.argmax(axis=1), -1)
    shape = (THINKING_SAMPLES, posterior.shape[1], len(at))
    samples = np.full(shape, NOT_RECORDED, dtype=np.int32)
    ranks = (np.arange(THINKING_SAMPLES) + 0.5) / THINKING_SAMPLES
    for row in range(posterior.shape[1]):
        for column, expert in enumerate(at):
            of = np.flatnonzero((category == row) & ~np.isnan(tokens[:, expert]))
            if len(of) < FEWEST_THINKING:
                continue
            order = of[np.lexsort((cut[of, expert], tokens[of, expert]))]
            drawn = order[(ranks * len(of)).astype(int)]
            found = tokens[drawn, expert]
            samples[:, row, column] = np.where(cut[drawn, expert], -1 - found, found)
    return RecordedThinking(tuple(table.experts[e] for e in at), samples)


def thinking_tensors(found: RecordedThinking | None) -> dict[str, NDArray[Any]]:
    """The tensors of an artifact that hold recorded lengths of thinking."""
    return {} if found is None else {"map.thinking_tokens": found.samples}


def token_tensors(found: RecordedTokens | None) -> dict[str, NDArray[Any]]:
    """The tensors of an artifact that hold recorded tokens."""
    if found is None:
        return {}
    return {
        "map.prompt_tokens": found.prompt.astype(np.float32),
        "map.answer_tokens": found.answer.astype(np.float32),
        "map.added_tokens": found.added.astype(np.float32),
    }


def choose_shrinkage(score: Floats, posterior: Floats, seed: int = 0) -> float:
    """Choose the shrinkage that best predicts differences between recipes on other rows.

    An error that all recipes of a row share changes no choice, and does not count.
    """
    fold = np.random.default_rng(seed).integers(0, FOLDS, len(score))
    error = np.zeros(len(SHRINKAGES))
    for k in range(FOLDS):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        if not len(inside) or not len(outside):
            continue
        for i, shrink_rows in enumerate(SHRINKAGES):
            cells = posterior_cells(score[inside], posterior[inside], shrink_rows)
            miss = score[outside] - posterior[outside] @ cells
            known = ~np.isnan(miss)
            shared = np.where(known, miss, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
            error[i] += float(np.nansum((miss - shared[:, None]) ** 2))
    return SHRINKAGES[int(error.argmin())]


def fit_map(
    played: RecipeResults, posterior: Floats, most_recipes: int = MOST_RECIPES
) -> PosteriorMap:
    """Fit the map on all rows, and keep all single experts and the best other recipes."""
    alone = sum(recipe.kind == "single" for recipe in played.recipes)  # they come first
    shrink_rows = choose_shrinkage(played.score[:, :alone], posterior)
    score = np.clip(posterior_cells(played.score, posterior, shrink_rows), 0.0, 1.0)
    cost = np.maximum(posterior_cells(played.cost, posterior, shrink_rows), 0.0)
    known = ~np.isnan(played.score)
    judged = np.flatnonzero(known.any(axis=0))
    alone = int((judged < alone).sum())
    count = posterior.T @ known
    sure = _surely_better(played.recipes, score, cost, count + shrink_rows)
    judged = judged[sure[judged]]
    limit = alone + most_recipes
    kept = judged[select_recipes(score[:, judged], cost[:, judged], limit, alone)]
    reach = np.zeros((posterior.shape[1], len(kept), MAX_LATER))
    for i in range(MAX_LATER):
        asked = np.where(known[:, kept], played.reach[:, kept, i], np.nan)
        reach[:, :, i] = np.clip(posterior_cells(asked, posterior, shrink_rows), 0.0, 1.0)
    total = posterior.sum()
    return PosteriorMap(
        recipes=tuple(played.recipes[r] for r in kept),
        score=score[:, kept],
        cost=cost[:, kept],
        reach=reach,
        count=count[:, kept],
        prior=posterior.sum(axis=0) / total
        if total > 0
        else np.full(posterior.shape[1], 1.0 / posterior.shape[1]),
        shrink_rows=shrink_rows,
    )


def _surely_better(
    recipes: Sequence[Recipe], score: Floats, cost: Floats, rows: Floats
) -> NDArray[np.bool_]:
    """Which recipes beat every mixture of their own experts somewhere by `LEAST_ERRORS` errors.

    Of many recipes, the best on few rows is mostly lucky. A single expert always passes.
    """
    single = {r.members[0]: i for i, r in enumerate(recipes) if r.kind == "single"}
    error = np.sqrt(score * (1 - score) / np.maximum(rows, 1.0))
    found = np.ones(len(recipes), dtype=np.bool_)
    for r, recipe in enumerate(recipes):
        if recipe.kind == "single":
            continue
        own = [single[name] for name in recipe.experts]
        found[r] = any(
            score[c, r] - mixture(score[c, own], cost[c, own], float(cost[c, r]))
            > LEAST_ERRORS * error[c, r]
            for c in range(len(score))
        )
    return found


def held_out_choices(
    table: Table, played: RecipeResults, posterior: Floats, seed: int = 0
) -> Played:
    """Decide about every prompt at every price by a map that was fitted on other folds.

    Waiting does not count: all experts are taken to be idle. Rows without an outcome of the best
    single expert are left out.
    """
    fold = np.random.default_rng(seed + 1).integers(0, FOLDS, len(table))
    quality = np.full(played.score.shape, -np.inf)
    expected = np.zeros(played.score.shape)
    reference = np.zeros(len(table))
    column = {recipe: r for r, recipe in enumerate(played.recipes)}
    for k in range(FOLDS):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        if not len(inside) or not len(outside):
            continue
        found = fit_map(played.rows(inside), posterior[inside])
        at = np.ix_(outside, np.array([column[recipe] for recipe in found.recipes]))
        known = posterior[outside]
        p = np.where(known.sum(axis=1, keepdims=True) > 0, known, found.prior)
        quality[at] = np.where(np.isnan(played.score[at]), -np.inf, p @ found.score)
        expected[at] = p @ found.cost
        reference[outside] = expected[at] @ best_shares(found.score, found.cost.mean(axis=0))
    best = int(np.nanmean(table.score, axis=0).argmax())
    whole = np.flatnonzero(np.isfinite(quality).any(axis=1) & ~np.isnan(table.score[:, best]))
    return play_choices(
        "held out",
        table.experts[best : best + 1],
        (table.score[whole, best : best + 1], table.cost[whole, best : best + 1]),
        quality[whole],
        (expected[whole], played.score[whole], played.cost[whole]),
        reference[whole],
        [table.prompts[i] for i in whole],
        np.ones(len(whole), dtype=bool),
    )


def held_out_gains(
    table: Table, played: RecipeResults, posterior: Floats, seed: int = 0
) -> tuple[str, float, list[Gain]]:
    """Judge the presets on prompts that the map was not fitted on, by folds.

    Waiting does not count: all experts are taken to be idle.

    Returns:
        The best single expert, its mean score, and the gains of the presets.
    """
    rows = len(table)
    best = int(np.nanmean(table.score, axis=0).argmax())
    fold = np.random.default_rng(seed + 1).integers(0, FOLDS, rows)
    score = {name: np.full(rows, np.nan) for name in PRESETS}
    cost = {name: np.full(rows, np.nan) for name in PRESETS}
    first: dict[str, list[str]] = {name: [""] * rows for name in PRESETS}
    column = {recipe: r for r, recipe in enumerate(played.recipes)}
    for k in range(FOLDS):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        if not len(inside) or not len(outside):
            continue
        found = fit_map(played.rows(inside), posterior[inside])
        at = np.array([column[recipe] for recipe in found.recipes])
        known = np.where(posterior[outside].sum(axis=1, keepdims=True) > 0, posterior[outside], 0)
        p = np.where(known.sum(axis=1, keepdims=True) > 0, known, found.prior)
        quality, price = p @ found.score, p @ found.cost
        quality = np.where(np.isnan(played.score[np.ix_(outside, at)]), -np.inf, quality)
        reference = price @ best_shares(found.score, found.cost.mean(axis=0))
        reference = np.where(reference > 0, reference, np.inf)[:, None]
        for name, preset in PRESETS.items():
            weight = PresetsConfig().of(preset).cost_weight
            choice = (quality - weight * price / reference).argmax(axis=1)
            score[name][outside] = played.score[outside, at[choice]]
            cost[name][outside] = played.cost[outside, at[choice]]
            for row, chosen in zip(outside, choice, strict=True):
                first[name][row] = found.recipes[chosen].name
    known_rows = ~np.isnan(table.score[:, best])
    usual = float(table.cost[known_rows, best].mean())
    gains = []
    for name in PRESETS:
        lead = (score[name] - table.score[:, best])[known_rows]
        names, counts = np.unique(np.array(first[name]), return_counts=True)
        gains.append(
            Gain(
                name,
                float(np.nanmean(score[name])),
                float(np.nanmean(lead)),
                float(np.nanstd(lead) / np.sqrt(len(lead))),
                float(np.nanmean(cost[name]) / usual) if usual > 0 else 0.0,
                {str(n): float(c) / rows for n, c in zip(names, counts, strict=True)},
            )
        )
    return table.experts[best], float(np.nanmean(table.score[:, best])), gains


def run(
    *,
    classifier: Path,
    outcomes: Sequence[Path],
    out: Path,
    costs: Path | None = None,
    experts: Sequence[str] | None = None,
    source: str = "",
    say: Callable[[str], None] = print,
) -> Artifact:
    """Add a map to the classifier of an artifact, and write both as a new one.

    Raises:
        OutcomeError: The outcomes can't be used.
        ArtifactError: The artifact can't be used, or `out` is no name of one.
    """
    known = load_artifact(classifier)
    model = Classifier.from_artifact(known, table_of(known))
    table, skipped = read_outcomes(outcomes, costs_of(costs, outcomes), experts)
    for line in skipped.lines():
        say(line)
    posterior = posteriors(model, table.prompts)
    if not posterior.any():
        raise OutcomeError("the classifier knows none of the prompts: every one is too new for it")
    played = play(candidates(table), table)
    found = fit_map(played, posterior)
    best, best_score, gains = held_out_gains(table, played, posterior)
    say(f"{len(table)} prompts, {len(table.experts)} experts, {len(found.recipes)} recipes kept")
    for line in gain_lines(best, best_score, gains):
        say(line)
    own = own_to_json(judge_own(held_out_choices(table, played, posterior)))
    say(preset_text(own, None))
    tokens = recorded_tokens(table, read_tokens(outcomes, table), posterior)
    thinking = recorded_thinking(table, read_thinking(outcomes, table), posterior)
    judged = (best, best_score, gains)
    return _write(known, table, found, (tokens, thinking), judged, own, outcomes, source, out)


def _thinking_section(found: RecordedThinking | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {"thinking_experts": list(found.experts), "thinking_samples": len(found.samples)}


def gain_lines(best: str, best_score: float, gains: Sequence[Gain]) -> list[str]:
    """The held-out gains as a table in Markdown."""
    lines = [
        "| held out | score, % | beside the best, points | cost of always the best |",
        "| --- | --- | --- | --- |",
        f"| always `{best}` | {100 * best_score:.1f} | | 100 % |",
    ]
    lines += [
        f"| `{one.preset}` | {100 * one.score:.1f} | {100 * one.lead:+.1f} ± "
        f"{196 * one.lead_se:.1f} | {100 * one.cost:.0f} % |"
        for one in gains
    ]
    return lines


def _write(
    known: Artifact,
    table: Table,
    found: PosteriorMap,
    lengths: tuple[RecordedTokens | None, RecordedThinking | None],
    judged: tuple[str, float, list[Gain]],
    presets: Mapping[str, Mapping[str, Any]],
    outcomes: Sequence[Path],
    source: str,
    out: Path,
) -> Artifact:
    tokens, thinking = lengths
    section = dict(known.section("classifier"))
    factors = int(section.get("factors", 0))
    cells = found.score.shape
    # The classifier's factors, if it has any, have no loadings here.
    slopes = np.zeros((cells[0], factors, cells[1]), dtype=np.float32)
    added: dict[str, NDArray[Any]] = {
        "map.prior": found.prior.astype(np.float32),
        "map.score": found.score.astype(np.float32),
        "map.count": found.count.astype(np.float32),
        "map.cost": found.cost.astype(np.float32),
        "map.reach": found.reach.astype(np.float32),
        "map.score_slope": slopes,
        "map.cost_slope": slopes,
        "fit.rows": prompt_hashes(table.prompts),
        **token_tensors(tokens),
        **thinking_tensors(thinking),
    }
    kept = {k: v for k, v in known.tensors.items() if not k.startswith(("map.", "fit."))}
    own = ("kind", "schema_version", "name", "weights")
    manifest = {k: v for k, v in known.manifest.items() if k not in own}
    best, best_score, gains = judged
    data = [
        {"file": f.name, "sha256": hashlib.sha256(f.read_bytes()).hexdigest(), "source": source}
        for f in outcomes
    ]
    manifest |= {
        "classifier": section,
        "experts": list(table.experts),
        "map": {
            "recipes": [recipe.to_json() for recipe in found.recipes],
            "factors": factors,
            **({} if tokens is None else {"token_experts": list(tokens.experts)}),
            **_thinking_section(thinking),
            **presets_section(presets),
            "classifier": known.name,
            "shrink_rows": found.shrink_rows,
            "data": data,
            "rows": len(table),
            "held_out": {
                "folds": FOLDS,
                "best": best,
                "best_score": best_score,
                "gains": [
                    {
                        "preset": one.preset,
                        "score": one.score,
                        "lead": one.lead,
                        "lead_se": one.lead_se,
                        "cost": one.cost,
                        "shares": dict(one.shares),
                    }
                    for one in gains
                ],
            },
        },
    }
    card = _card(out.name, known, table, found, judged, presets, data)
    return save_artifact(out, manifest, kept | added, card)


def _card(
    name: str,
    known: Artifact,
    table: Table,
    found: PosteriorMap,
    judged: tuple[str, float, list[Gain]],
    presets: Mapping[str, Mapping[str, Any]],
    data: Sequence[Mapping[str, str]],
) -> str:
    labels = [str(label) for label in known.section("classifier")["categories"]]
    alone = [r for r, recipe in enumerate(found.recipes) if recipe.kind == "single"]
    rows = found.count.max(axis=1)
    order = np.argsort(-rows, kind="stable")
    lines = []
    for c in order:
        top = int(found.score[c].argmax())
        own = f"{rows[c]:.0f}" if rows[c] >= LEAST_ROWS else "none of its own"
        lines.append(
            f"| {labels[c]} | {own} | "
            + " | ".join(f"{100 * found.score[c, r]:.0f}" for r in alone)
            + f" | {found.recipes[top].name} ({100 * found.score[c, top]:.0f}) |"
        )
    winners = {found.recipes[int(found.score[c].argmax())].name for c in range(len(labels))}
    spread = (
        f"One recipe, `{next(iter(winners))}`, is the best in every category: without a price of "
        "cost or time, `auto` always takes it."
        if len(winners) == 1
        else f"{len(winners)} recipes are the best in some category."
    )
    files = "\n".join(f"| {d['file']} | {d['source']} | `{d['sha256'][:16]}` |" for d in data)
    count = f"{len(labels)} categories" + (f", `{GENERAL}` included" if GENERAL in labels else "")
    best, best_score, gains = judged
    card = known.path / CARD
    about = card.read_text(encoding="utf-8") if card.is_file() else ""
    about = "\n".join(f"#{line}" if line.startswith("#") else line for line in about.splitlines())
    return f"""# {name}: which recipe is worth its price for a prompt

The classifier of `{known.name}` and a map of {len(found.recipes)} recipes over its
{count}. Experts: {", ".join(f"`{e}`" for e in table.experts)}.

## Data

{len(table)} prompts with outcomes. A prompt counts in each category by the classifier's
posterior on it, and not by the name of a category in the data. The artifact has no text, only
weights and hashes of the prompts.

| file | what | SHA-256 begins |
| --- | --- | --- |
{files}

## Expected gains

{FOLDS} folds: a map that was fitted on the other folds decides about each prompt. Waiting is not
counted. ± is a 95 % interval.

By the general presets:

{chr(10).join(gain_lines(best, best_score, gains))}

## Presets of this composition

{preset_text(presets, None)}

## The map

Expected score in %. A category without rows of its own has about the overall means.
{spread}

| category | rows | {" | ".join(found.recipes[r].name for r in alone)} | best |
| --- | --- |{" --- |" * (len(alone) + 1)}
{chr(10).join(lines)}

Shrunk toward each recipe's overall mean by {found.shrink_rows:.0f} rows in each category, which
predicted other rows best. Cascades and votes are kept where they beat every mixture of their own
experts by {LEAST_ERRORS:.0f} standard errors in some category.

## Limits

Scores are of these experts on prompts like these. Record outcomes on prompts of your own with
`coe outcomes record`, and fit again.

## The classifier

{about}
"""

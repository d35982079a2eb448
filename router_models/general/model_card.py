"""The model card of the general router."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from router_models.general.router_evaluation import percent
from service.classifier.classifier import GENERAL

_STAGES = {"static": "n-grams and static table", "encoder": "and the encoder, as served"}
# How often figures of the held-out prompts were looked at; count on with each fit and each trial.
_LOOKS = 11
_FIGURES = {
    "accuracy": "accuracy on prompts of a category",
    "unknown_to_general": "prompts of no category that get `general`",
    "known_to_general": "prompts of a category that get `general`",
    "wrong_above_0.9": "wrong with a confidence of 0.9 or more",
}


def card(name: str, manifest: dict[str, Any]) -> str:
    """The card as Markdown.

    Args:
        name: The artifact's name.
        manifest: Its manifest, with `metrics.calibration`, `metrics.test` and perhaps
            `metrics.folds`.
    """
    metrics = manifest["metrics"]
    tested = metrics["test"]
    least = manifest["classifier"]["thresholds"]["min_confidence"]
    categories = ", ".join(c for c in manifest["categories"] if c != GENERAL)
    sources = [
        _row(source, [f"{found['rows']:,.0f}", f"{found['weight']:,.0f}"])
        for source, found in manifest["rows"].items()
    ]
    curve = [
        _row(f"{p['when_below']:.2f}", [f"{100 * p['asked']:.0f} %", percent(p["accuracy"])])
        for p in tested["curve"]
    ]
    return f"""# {name}: which of 26 everyday categories a prompt belongs to

Fitted by `python -m router_models.general.router_fit`: three linear models, on hashed n-grams, on
the service's multilingual static table and on the multilingual Universal Sentence Encoder
(`use-multilingual-v3`), joined as a product of posteriors. A prompt counts as `general` below a
confidence of {least:.3g}, where the model takes it for a text that asks for nothing, and where it
is new to every stage. `{name}` itself has no map of experts: experts name categories in the config.
The licence of the weights is Apache-2.0. The artifact holds weights and hashed n-grams, and no
text.

Categories: {categories}.

## Data

| source | rows | weight |
| --- | --- | --- |
{_lines(sources)}

`own` is `general/prompts`, in 13 languages; `forms of own` are the same with slips, polite words
and other endings. `unknown` (`general/unknown`) are texts that ask for nothing, by hand, and
`scraps` such by a program: both teach `general`.
In no category do public data weigh more than 0.3 of our own prompts. Prompts by another author
(`general/calibration`) chose exponents, temperatures and thresholds; for temperatures and exponents
rows out of fold have a quarter of the weight.

| data | licence | authors | SHA-256 begins |
| --- | --- | --- | --- |
{_lines(_data(manifest["data"]))}

CLINC150 is licensed under CC BY 3.0 (https://creativecommons.org/licenses/by/3.0/); its texts were
turned into counts of n-grams and vectors.

## Held-out prompts

{tested["prompts"]} prompts by a third author (`general/test`), which chose nothing. They were
looked at {_LOOKS} times until now. In brackets are 95 % intervals. The encoder is asked
below a confidence of {tested["when_below"]}: for {100 * tested["asked"]:.0f} % of these prompts.
Without an encoder the first column counts.

{_table(_figures(tested["stages"]))}

### Calibration

The expected calibration error out of distribution stands above. {_calibrated(metrics)}
{_folds(metrics)}
### Languages

{_table(_groups(tested["stages"], "by_language"))}

{tested["same_team"]["prompts"]} more prompts, one of each category in five further languages
(`general/test/same-team`), are by the team that also wrote prompts of the fit. They were written
before it fitted these languages anew, and near-duplicates were taken out of the fit. They tell less
than the others:

{_table(_groups(tested["same_team"]["stages"], "by_language"))}

Their calibration error is {_errors(tested["same_team"]["stages"])}. That of a single one of these
languages says little: on 26 prompts a perfectly calibrated classifier would have 0.08 to 0.12, and
on all 130 it would have 0.05 to 0.06.

### Categories

{_table(_groups(tested["stages"], "by_category"))}

### The same prompt in another form

How often a prompt and another form of it (`general/perturbations.py`) get the same expert. With an
expert for each category:

{_table(_groups(tested["stages"], "unchanged"))}

With the demo's four experts, for mathematics, code, commands and all else:

{_table(_groups(tested["stages"], "unchanged_expert"))}

### Prompts of no category

What it would cost to send more of them to `general`: a prompt would also go there where the
probability of `general` is above a bar. It is not done: a prompt of no category goes to some
expert, while a prompt of a category that is given up misses its own.

| bar | {" | ".join(_STAGES.values())} |
| --- |{" --- |" * len(_STAGES)}
{_lines(_giving_up(tested["stages"]))}

### Accuracy against cost

| the encoder is asked below | of the prompts | accuracy |
| --- | --- | --- |
{_lines(curve)}

### Confusion

What is served for the prompts of each category:

| category | given |
| --- | --- |
{_lines(_confusion(tested["confusion"]))}

## Limits

- Languages other than English rest on few prompts of the fit, and on few held-out ones. The encoder
  and the table do not know Hindi: there the n-grams decide.
- The table and the encoder read texts in lower case.
- Language models wrote all of our own prompts, those of the test as well, and they think of the
  same subjects. People's prompts can be further away.
- A prompt that asks for two kinds of work gets one category.
"""


def _figures(stages: dict[str, Any]) -> list[str]:
    rows = [_row(t, [percent(s[key]) for s in stages.values()]) for key, t in _FIGURES.items()]
    error = _row("calibration error", [f"{s['ece']:.3f}" for s in stages.values()])
    return [rows[0], error, *rows[1:]]


def _groups(stages: dict[str, Any], key: str) -> list[str]:
    names = next(iter(stages.values()))[key]
    return [_row(name, [percent(s[key][name]) for s in stages.values()]) for name in names]


def _errors(stages: dict[str, Any]) -> str:
    return " and ".join(f"{stages[name]['ece']:.3f} ({title})" for name, title in _STAGES.items())


def _giving_up(stages: dict[str, Any]) -> list[str]:
    rows = []
    for points in zip(*(stage["giving_up"] for stage in stages.values()), strict=True):
        cells = [
            f"{100 * p['unknown']:.0f} % of no category, {100 * p['known']:.1f} % of a category; "
            f"{100 * p['accuracy']:.1f} % right"
            for p in points
        ]
        bar = points[0]["above"]
        rows.append(_row("as served" if bar >= 1 else f"{bar:g}", cells))
    return rows


def _table(rows: list[str]) -> str:
    head = [_row("", list(_STAGES.values())), "| --- |" + " --- |" * len(_STAGES)]
    return _lines([*head, *rows])


def _confusion(confusion: dict[str, dict[str, int]]) -> list[str]:
    found = []
    for want, row in confusion.items():
        ranked = sorted(row.items(), key=lambda cell: (-cell[1], cell[0]))
        found.append(_row(want, [", ".join(f"{got} {count}" for got, count in ranked)]))
    return found


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _lines(rows: Iterable[str]) -> str:
    return "\n".join(rows)


def _data(data: list[dict[str, str]]) -> list[str]:
    return [
        _row(d["title"], [d["license"], d["credit"], f"`{d['sha256'][:16]}`"])
        for d in data
        if d["credit"] != "this project"
    ]


def _calibrated(metrics: dict[str, Any]) -> str:
    titles = {"ngrams": "n-grams alone", "static": "and static table", "encoder": "and the encoder"}
    given = metrics["calibration"]
    errors = ", ".join(f"{given[stage]['ece']:.3f} ({title})" for stage, title in titles.items())
    return f"On the prompts that calibrated, by yet another author, it is {errors}."


def _folds(metrics: dict[str, Any]) -> str:
    if "folds" not in metrics:
        return ""
    folds = metrics["folds"]
    rows = []
    for source, found in folds.items():
        if source == "folds":
            continue
        cells = [
            f"{100 * found[stage]['accuracy']:.1f} %, {found[stage]['ece']:.3f}"
            for stage in ("static", "encoder")
        ]
        rows.append(_row(source, [f"{found['static']['prompts']:,}", *cells]))
    return f"""
In distribution: accuracy and calibration error within the data of the fit, {folds["folds"]} folds,
the encoder asked for all prompts in the last column. Our own prompts come as near pairs of
different categories, so that folds take away a prompt's nearest neighbours: they are harder than
other people's prompts.

| source | prompts | n-grams and static table | and the encoder |
| --- | --- | --- | --- |
{_lines(rows)}
"""

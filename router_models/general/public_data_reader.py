"""Reads public labelled data as prompts of the everyday categories.

`public_data.yaml` says which files there are, whose they are, and which label
belongs to which category. The files lie in a folder that the user names:

    python -m router_models.general.public_data_reader --data FOLDER
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from router_models.general.categories import general_categories

SOURCES_FILE = Path(__file__).with_name("public_data.yaml")
_TEXTS = ("name", "title", "license", "attribution", "url", "file", "prompt")
_OPTIONAL = ("label", "category", "categories", "split", "id_prefix", "cut_at")


class PublicDataError(ValueError):
    """The table of sources or one of the data files is not well formed, or is missing."""


@dataclass(frozen=True)
class Source:
    """A public data set and what its labels are here.

    Attributes:
        name: Its name in arguments and reports.
        title: Its name for people.
        license: The SPDX name of its licence, without a version's suffix.
        attribution: Whom to credit.
        url: Where it comes from.
        file: The file's name in the data folder.
        prompt_field: The field with the text.
        label_field: The field with the label, None where all rows are of one category.
        categories: From label to category, None for labels that go nowhere. Without
            a label field the one key is the empty text.
        split_field: The field with the publishers' split, if there is one.
        id_prefix: How the `id` of this source's rows begins, if the file has others.
        cut_at: The text ends before this mark, if it stands there.
    """

    name: str
    title: str
    license: str
    attribution: str
    url: str
    file: str
    prompt_field: str
    label_field: str | None
    categories: Mapping[str, str | None]
    split_field: str | None
    id_prefix: str | None
    cut_at: str | None


@dataclass(frozen=True)
class PublicPrompt:
    """A prompt of a public data set with its category, the label it had and its split."""

    prompt: str
    category: str
    source: str
    label: str
    split: str | None


@dataclass(frozen=True)
class PublicData:
    """What was read: prompts, and how many rows had a label that goes nowhere."""

    prompts: tuple[PublicPrompt, ...]
    unmapped: Mapping[tuple[str, str], int]


def read_sources(path: Path = SOURCES_FILE) -> tuple[Source, ...]:
    """Read and check the table of sources.

    Raises:
        PublicDataError: A key is missing or unknown, a name stands twice, or a
            label goes to an unknown category.
    """
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or not isinstance(document.get("sources"), list):
        raise PublicDataError(f"{path}: 'sources' must be a list")
    sources = tuple(
        _source(f"{path}: source {number}", row)
        for number, row in enumerate(document["sources"], start=1)
    )
    for name, count in Counter(source.name for source in sources).items():
        if count > 1:
            raise PublicDataError(f"{path}: source {name!r} stands {count} times")
    return sources


def _source(place: str, row: object) -> Source:
    if not isinstance(row, dict) or not set(_TEXTS) <= set(row) <= {*_TEXTS, *_OPTIONAL}:
        raise PublicDataError(
            f"{place} must have the keys {', '.join(_TEXTS)}; allowed are also "
            f"{', '.join(_OPTIONAL)}"
        )
    for key in set(row) - {"categories"}:
        if not isinstance(row[key], str) or not row[key]:
            raise PublicDataError(f"{place}: {key!r} must be a text that is not empty")
    if {"label", "categories"} <= set(row) and "category" not in row:
        categories = row["categories"]
    elif "category" in row and not {"label", "categories"} & set(row):
        categories = {"": row["category"]}
    else:
        raise PublicDataError(f"{place} must have either 'label' and 'categories', or 'category'")
    if not isinstance(categories, dict) or not all(isinstance(label, str) for label in categories):
        raise PublicDataError(f"{place}: 'categories' must map texts to categories or null")
    allowed = general_categories().names
    for label, category in categories.items():
        if category is not None and category not in allowed:
            raise PublicDataError(
                f"{place}: label {label!r} goes to the unknown category {category!r}; "
                f"allowed are null, {', '.join(allowed)}"
            )
    return Source(
        name=row["name"],
        title=row["title"],
        license=row["license"],
        attribution=row["attribution"],
        url=row["url"],
        file=row["file"],
        prompt_field=row["prompt"],
        label_field=row.get("label"),
        categories=categories,
        split_field=row.get("split"),
        id_prefix=row.get("id_prefix"),
        cut_at=row.get("cut_at"),
    )


def read_public_data(
    folder: Path, names: Collection[str] | None = None, sources: Sequence[Source] | None = None
) -> PublicData:
    """Read the sources' files from a folder.

    Args:
        folder: Where the files lie, gzipped or not.
        names: Which sources to read; all by default.
        sources: The table of sources; the one that ships by default.

    Raises:
        PublicDataError: A name is unknown, a file is missing, or a row has not
            the fields and labels that the table says.
    """
    known = read_sources() if sources is None else tuple(sources)
    wanted = [source for source in known if names is None or source.name in names]
    unknown = set(names or ()) - {source.name for source in known}
    if unknown:
        raise PublicDataError(
            f"unknown sources: {', '.join(sorted(unknown))}; allowed are "
            f"{', '.join(source.name for source in known)}"
        )
    prompts: list[PublicPrompt] = []
    unmapped: Counter[tuple[str, str]] = Counter()
    for source in wanted:
        for place, row in _rows(_file(folder, source)):
            if source.id_prefix is not None and not _text(place, row, "id").startswith(
                source.id_prefix
            ):
                continue
            label = _text(place, row, source.label_field) if source.label_field else ""
            if label not in source.categories:
                raise PublicDataError(
                    f"{place}: {source.name} has no label {label!r}; the table has "
                    f"{', '.join(source.categories)}"
                )
            category = source.categories[label]
            if category is None:
                unmapped[source.name, label] += 1
                continue
            prompt = _text(place, row, source.prompt_field)
            if source.cut_at is not None:
                prompt = prompt.partition(source.cut_at)[0]
            split = _text(place, row, source.split_field) if source.split_field else None
            prompts.append(PublicPrompt(prompt.strip(), category, source.name, label, split))
    return PublicData(tuple(prompts), dict(unmapped))


def _file(folder: Path, source: Source) -> Path:
    """Return the source's file, as it is named or without `.gz`."""
    for path in (folder / source.file, folder / source.file.removesuffix(".gz")):
        if path.is_file():
            return path
    raise PublicDataError(
        f"{folder / source.file}: no such file; {source.name} ({source.license}) comes from "
        f"{source.url}"
    )


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield each row of a file with its place, `file:line`."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise PublicDataError(f"{path}:{number}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise PublicDataError(f"{path}:{number}: a row must be a JSON object")
                yield f"{path}:{number}", row
    except (OSError, EOFError) as error:
        raise PublicDataError(f"{path}: can't be read: {error}") from None


def _text(place: str, row: Mapping[str, object], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise PublicDataError(f"{place}: {key!r} must be a text that is not empty")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Print how many prompts of each category the sources in a folder have."""
    parser = argparse.ArgumentParser(
        prog="python -m router_models.general.public_data_reader", description=main.__doc__
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the data files")
    parser.add_argument("--source", action="append", help="read only this source; may be repeated")
    args = parser.parse_args(argv)
    try:
        data = read_public_data(args.data, args.source)
    except PublicDataError as error:
        print(error, file=sys.stderr)
        return 2
    counts = Counter((row.source, row.category) for row in data.prompts)
    for (source, category), count in counts.items():
        print(f"{source:<12}{category:<32}{count:>7,}")
    for (source, label), count in data.unmapped.items():
        print(f"{source:<12}{f'({label}: none)':<32}{count:>7,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

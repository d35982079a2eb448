"""Which labels of public data become which category, and what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from router_models.general.categories import general_categories
from router_models.general.public_data_reader import (
    PublicDataError,
    PublicPrompt,
    main,
    read_public_data,
    read_sources,
)

SOURCE = {
    "name": "quiz",
    "title": "A quiz",
    "license": "MIT",
    "attribution": "Somebody, 2024",
    "url": "https://example.org/quiz",
    "file": "quiz.jsonl.gz",
    "prompt": "text",
    "label": "topic",
    "categories": {"statutes": "law", "mixed": None},
}
ONE = {key: value for key, value in SOURCE.items() if key not in ("label", "categories")}
ONE |= {"category": "law"}


def _table(folder: Path, *sources: object) -> Path:
    path = folder / "sources.yaml"
    path.write_text(yaml.safe_dump({"sources": list(sources)}, sort_keys=False), encoding="utf-8")
    return path


def _data(folder: Path, *rows: object, name: str = "quiz.jsonl") -> None:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    if name.endswith(".gz"):
        (folder / name).write_bytes(gzip.compress(text.encode()))
    else:
        (folder / name).write_text(text, encoding="utf-8")


def test_shipped_table_names_licence_and_authors_of_every_source() -> None:
    sources = read_sources()
    assert [source.name for source in sources] == [
        "mmlu-pro",
        "gsm8k",
        "mt-bench",
        "arena-hard",
        "clinc150",
    ]
    for source in sources:
        assert source.license in {"Apache-2.0", "MIT", "CC-BY-3.0"}
        assert source.attribution
        assert source.url.startswith("https://github.com/")


def test_shipped_table_maps_all_fields_and_intents() -> None:
    of = {source.name: source.categories for source in read_sources()}
    assert len(of["mmlu-pro"]) == 14
    assert len(of["clinc150"]) == 151  # 150 intents, and those out of scope
    assert of["clinc150"].keys() >= {"yes", "no", "maybe"}  # no booleans of YAML
    assert of["gsm8k"] == {"": "math-word-problems"}


@pytest.mark.parametrize(
    ("source", "label", "category"),
    [
        ("mmlu-pro", "economics", "business"),
        ("mmlu-pro", "other", None),
        ("mmlu-pro", "physics", "natural-sciences"),
        ("clinc150", "alarm", "commands"),
        ("clinc150", "balance", "commands"),
        ("clinc150", "recipe", "everyday-advice"),
        ("clinc150", "greeting", "small-talk"),
        ("clinc150", "translate", "translation"),
        ("clinc150", "rollover_401k", "business"),
        ("clinc150", "oos", None),
        ("arena-hard", "creative_writing", "writing"),
        ("mt-bench", "reasoning", "logic-puzzles"),
    ],
)
def test_shipped_table_maps_label(source: str, label: str, category: str | None) -> None:
    of: Mapping[str, Mapping[str, str | None]] = {
        row.name: row.categories for row in read_sources()
    }
    assert of[source][label] == category
    assert category is None or category in general_categories().names


@pytest.mark.parametrize("name", ["quiz.jsonl", "quiz.jsonl.gz"])
def test_read_public_data_maps_rows_and_counts_the_others(tmp_path: Path, name: str) -> None:
    source = SOURCE | {"cut_at": "\n(A) ", "split": "part", "id_prefix": "q/"}
    sources = read_sources(_table(tmp_path, source))
    row = {"id": "q/1", "text": "Who owns it?\n(A) I\n(B) you", "topic": "statutes", "part": "test"}
    _data(
        tmp_path,
        row,
        "",
        row | {"id": "other/1", "topic": "unknown there"},
        row | {"topic": "mixed"},
        row | {"text": " Is it mine? ", "part": "train"},
        name=name,
    )
    data = read_public_data(tmp_path, sources=sources)
    assert data.prompts == (
        PublicPrompt("Who owns it?", "law", "quiz", "statutes", "test"),
        PublicPrompt("Is it mine?", "law", "quiz", "statutes", "train"),
    )
    assert data.unmapped == {("quiz", "mixed"): 1}


def test_read_public_data_source_of_one_category_needs_no_label(tmp_path: Path) -> None:
    sources = read_sources(_table(tmp_path, ONE))
    _data(tmp_path, {"text": "Is it mine?"})
    assert read_public_data(tmp_path, sources=sources).prompts == (
        PublicPrompt("Is it mine?", "law", "quiz", "", None),
    )


def test_read_public_data_reads_only_the_named_sources(tmp_path: Path) -> None:
    sources = read_sources(_table(tmp_path, ONE, ONE | {"name": "absent", "file": "no.jsonl"}))
    _data(tmp_path, {"text": "Is it mine?"})
    assert len(read_public_data(tmp_path, ["quiz"], sources).prompts) == 1
    with pytest.raises(PublicDataError, match=r"no\.jsonl: no such file; absent \(MIT\) comes"):
        read_public_data(tmp_path, sources=sources)
    with pytest.raises(PublicDataError, match="unknown sources: quizz; allowed are quiz, absent"):
        read_public_data(tmp_path, ["quizz"], sources)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ({"text": "x", "topic": "sport"}, "no label 'sport'; the table has statutes, mixed"),
        ({"text": "x"}, "'topic' must be a text"),
        ({"topic": "statutes"}, "'text' must be a text"),
        ({"text": " ", "topic": "statutes"}, "'text' must be a text"),
    ],
)
def test_read_public_data_bad_row_is_refused_with_file_and_line(
    tmp_path: Path, row: object, message: str
) -> None:
    sources = read_sources(_table(tmp_path, SOURCE))
    _data(tmp_path, {"text": "Is it mine?", "topic": "statutes"}, row)
    with pytest.raises(PublicDataError, match=message) as caught:
        read_public_data(tmp_path, sources=sources)
    assert str(caught.value).startswith(f"{tmp_path / 'quiz.jsonl'}:2: ")


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b'{"text": "x"}')[:-6]])
def test_read_public_data_broken_gzip_is_refused(tmp_path: Path, content: bytes) -> None:
    sources = read_sources(_table(tmp_path, ONE))
    (tmp_path / "quiz.jsonl.gz").write_bytes(content)
    with pytest.raises(PublicDataError, match=r"quiz\.jsonl\.gz: can't be read"):
        read_public_data(tmp_path, sources=sources)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("quiz", "must have the keys name"),
        (SOURCE | {"colour": "red"}, "must have the keys name"),
        ({key: SOURCE[key] for key in SOURCE if key != "license"}, "must have the keys name"),
        (SOURCE | {"title": ""}, "'title' must be a text"),
        (SOURCE | {"cut_at": 3}, "'cut_at' must be a text"),
        (SOURCE | {"category": "law"}, "either 'label' and 'categories', or 'category'"),
        (ONE | {"label": "topic"}, "either 'label' and 'categories', or 'category'"),
        (SOURCE | {"categories": ["law"]}, "'categories' must map texts"),
        (SOURCE | {"categories": {True: "law"}}, "'categories' must map texts"),
        (SOURCE | {"categories": {"x": "laws"}}, "'x' goes to the unknown category 'laws'"),
        (SOURCE | {"categories": {"x": "general"}}, "unknown category 'general'"),
        (ONE | {"category": "laws"}, "unknown category 'laws'"),
    ],
)
def test_read_sources_malformed_source_is_refused_with_its_place(
    tmp_path: Path, source: object, message: str
) -> None:
    path = _table(tmp_path, SOURCE | {"name": "good"}, source)
    with pytest.raises(PublicDataError, match=message) as caught:
        read_sources(path)
    assert str(caught.value).startswith(f"{path}: source 2")


def test_read_sources_one_name_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PublicDataError, match="'quiz' stands 2 times"):
        read_sources(_table(tmp_path, SOURCE, ONE))


def test_read_sources_without_a_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sources.yaml"
    path.write_text("sources: 3", encoding="utf-8")
    with pytest.raises(PublicDataError, match="must be a list"):
        read_sources(path)


def test_main_prints_counts_of_the_shipped_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": "mt_bench/1", "prompt": "Be a tree.", "category": "roleplay"}]
    rows += [{"id": "mt_bench/2", "prompt": "Explain X.", "category": "stem"}]
    _data(tmp_path, *rows, name="labelled_prompts.jsonl.gz")
    assert main(["--data", str(tmp_path), "--source", "mt-bench"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["mt-bench", "roleplay", "1"], ["mt-bench", "(stem:", "none)", "1"]]


def test_main_says_which_file_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(tmp_path), "--source", "gsm8k"]) == 2
    assert "gsm8k_train.jsonl.gz: no such file" in capsys.readouterr().err

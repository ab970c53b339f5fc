"""The data room: rows of files and of the hub, prompts and their cuts, token ids, batches.

The judges are json, the tokenizer's own ids and truncation, brute force, and plain loops.
"""

from __future__ import annotations

import csv
import gzip
import json
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralab.data.batches import collate, evaluation_batches, plan_batches
from loralab.data.encode import EncodedSplit, encode, encode_sources, resolve_length, resolve_lengths
from loralab.data.prompts import Prompt
from loralab.data.sources import Example, Split, read_split, splits_of
from loralab.errors import DataError, ModelError, RecipeError

INSTRUCTION = "Summarize the following conversation.\n\n{dialogue}\n\nSummary: "
ROWS = [
    {"id": "a", "dialogue": 'A: one, "two"\r\nB: three', "summary": "Numbers."},
    {"id": "b", "dialogue": "A: é {x} 😀\nB: {dialogue}", "summary": "Signs, in braces."},
    {"id": "c", "dialogue": "A: bye", "summary": "A leaves."},
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(folder: Path, split: str = "train", max_rows: int | None = None) -> Split:
    return read_split(str(folder), split, "dialogue", "summary", max_rows)


def real_rows(folder: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in gzip.decompress((folder / f"{split}.jsonl.gz").read_bytes()).splitlines()]


@pytest.fixture(scope="session")
def tokenizers(data_folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(data_folder / "tokenizers" / name) for name in ("t5", "gpt2")}


@pytest.fixture(scope="session")
def t5(tokenizers: dict[str, Any]) -> Any:
    return tokenizers["t5"]


@pytest.fixture(scope="session")
def dialogues(data_folder: Path) -> Split:
    return read(data_folder / "dialogsum", "validation")


@pytest.fixture(scope="session")
def train_lengths(data_folder: Path, t5: Any) -> tuple[np.ndarray, np.ndarray]:
    """(source, target) lengths of DialogSum's training rows under the third experiment's prompt, cut at 512 and 128."""
    encoded = encode(read(data_folder / "dialogsum"), t5, Prompt(INSTRUCTION, "dialogue"), 512, 128)
    return encoded.source_lengths, encoded.target_lengths


# Sources.


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_real_row_is_read_as_json_reads_it(data_folder: Path, split: str) -> None:
    rows = real_rows(data_folder / "dialogsum", split)
    got = read(data_folder / "dialogsum", split)
    assert got.examples == tuple(Example(n, row["dialogue"], (row["summary"],)) for n, row in enumerate(rows, 1))
    assert (got.split, got.skipped_empty, len(got)) == (split, (), len(rows))


def test_samsum_loses_its_empty_dialogue_and_its_carriage_returns(data_folder: Path) -> None:
    rows = real_rows(data_folder / "samsum", "train")
    got = read(data_folder / "samsum")
    (empty,) = (number for number, row in enumerate(rows, 1) if row["id"] == "13828807")
    assert got.skipped_empty == (empty,)
    assert len(got) == len(rows) - 1
    assert empty not in {example.row for example in got.examples}
    for example in got.examples:
        row = rows[example.row - 1]
        assert example.source == row["dialogue"].replace("\r\n", "\n")
        assert example.targets == (row["summary"].replace("\r\n", "\n"),)


def test_formats_agree_in_rows_and_hash(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("jsonl", "gz", "csv", "bom")]
    for folder in folders:
        folder.mkdir()
    plain = write_jsonl(folders[0] / "train.jsonl", ROWS).read_bytes()
    (folders[1] / "train.jsonl.gz").write_bytes(gzip.compress(plain))
    write_csv(folders[2] / "train.csv", ROWS)
    reordered = [{name: row[name] for name in ("dialogue", "id", "summary")} for row in ROWS]
    write_csv(folders[3] / "train.csv", reordered, encoding="utf-8-sig")
    got = [read(folder) for folder in folders]
    assert got[0].examples[0] == Example(1, 'A: one, "two"\nB: three', ("Numbers.",))
    assert got[0].examples[1].source == ROWS[1]["dialogue"]
    for other in got[1:]:
        assert (other.examples, other.content_hash) == (got[0].examples, got[0].content_hash)


def test_content_hash_tells_texts_apart_and_nothing_else(tmp_path: Path) -> None:
    def content_hash(*rows: tuple[str, Any]) -> str:
        cells = [{"dialogue": source, "summary": target, "id": len(rows)} for source, target in rows]
        write_jsonl(tmp_path / "train.jsonl", cells)
        return read(tmp_path).content_hash

    variants = [
        [("a", "b"), ("c", "d")],
        [("c", "d"), ("a", "b")],
        [("a", "bc"), ("c", "d")],
        [("a", ["b", "c"]), ("c", "d")],
        [("ab", "c")],
        [("a", "bc")],
        [("a", "b\nc")],
    ]
    assert len({content_hash(*rows) for rows in variants}) == len(variants)
    assert content_hash(("a", "b"), ("", "x")) == content_hash(("a", ["b"]))


def test_empty_cells_are_passed_over_and_several_references_kept(tmp_path: Path) -> None:
    targets: list[Any] = ["one", "  \n", None, [], ["", "two", None, "three\r\n"], [" "]]
    rows: list[dict[str, Any]] = [{"dialogue": "A: hi", "summary": target} for target in targets]
    rows += [{"dialogue": empty, "summary": "s"} for empty in ("", "\r\n\t", None)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    got = read(tmp_path)
    assert got.examples == (Example(1, "A: hi", ("one",)), Example(5, "A: hi", ("two", "three\n")))
    assert got.skipped_empty == (2, 3, 4, 6, 7, 8, 9)


def test_row_numbers_are_line_numbers_and_max_rows_counts_used_rows(tmp_path: Path) -> None:
    lines = ["", json.dumps({"dialogue": "", "summary": "x"}), *(json.dumps(row) for row in ROWS), "  "]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert [example.row for example in read(tmp_path).examples] == [3, 4, 5]
    cut = read(tmp_path, max_rows=2)
    assert cut.examples == read(tmp_path).examples[:2]
    assert cut.skipped_empty == (2,)
    assert read(tmp_path, max_rows=99).content_hash == read(tmp_path).content_hash != cut.content_hash


def test_csv_takes_a_document_longer_than_the_default_limit(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [{"dialogue": "long " * 40_000, "summary": "s"}])
    assert read(tmp_path).examples[0].source == "long " * 40_000


def test_splits_of_a_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "validation.jsonl", ROWS)
    write_csv(tmp_path / "test.csv", ROWS)
    (tmp_path / "train.jsonl.gz").write_bytes(b"")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "notes.gz").write_bytes(b"")
    assert splits_of(str(tmp_path)) == ["test", "train", "validation"]


GOOD = json.dumps(ROWS[0])
BROKEN = {
    "a missing split": ("test.jsonl", GOOD, ["no split 'train'", "The splits are: test."]),
    "no file at all": ("notes.txt", GOOD, ["no split 'train'", "The splits are: none."]),
    "a missing column": (
        "train.jsonl",
        f'{GOOD}\n{{"id": 1, "dialog": "x", "text": "y"}}',
        [
            "train.jsonl, line 2:",
            "no column 'dialogue' (Did you mean 'dialog'?)",
            "no column 'summary'",
            "id, dialog, text",
        ],
    ),
    "a missing column of a csv": ("train.csv", "id,dialogue,sumary\n1,a,b", ["line 2", "Did you mean 'sumary'?"]),
    "an empty file": ("train.jsonl", "", ["train.jsonl: has no rows"]),
    "an empty gz": ("train.jsonl.gz", b"", ["train.jsonl.gz: has no rows"]),
    "an empty csv": ("train.csv", "", ["train.csv: has no rows"]),
    "a csv that is a header": ("train.csv", "dialogue,summary\n", ["train.csv: has no rows"]),
    "empty rows only": (
        "train.jsonl",
        '{"dialogue": "", "summary": "x"}',
        ["each of the 1 rows has an empty 'dialogue'"],
    ),
    "a truncated gz": (
        "train.jsonl.gz",
        gzip.compress("\n".join([GOOD] * 5000).encode(), mtime=0)[:-40],
        ["train.jsonl.gz, after line", "truncated or damaged", "end-of-stream"],
    ),
    "a damaged gz": (
        "train.jsonl.gz",
        gzip.compress(GOOD.encode(), mtime=0)[:-8] + b"\0" * 8,
        ["train.jsonl.gz", "truncated or damaged", "CRC"],
    ),
    "a gz that is none": ("train.jsonl.gz", GOOD, ["after line 0", "Not a gzipped file"]),
    "not JSON": ("train.jsonl", f'{GOOD}\n{GOOD}\n{{"dialogue": "cut o', ["train.jsonl, line 3: not JSON", "cut o"]),
    "JSON too deep": ("train.jsonl", "[" * 200_000, ["line 1: not JSON"]),
    "not an object": (
        "train.jsonl",
        f"{GOOD}\n[1, 2]",
        ["train.jsonl, line 2: a JSON list, '[1, 2]'", "one JSON object"],
    ),
    "not UTF-8": ("train.jsonl", GOOD.encode() + b'\n{"dialogue": "caf\xe9"}', ["train.jsonl, line 2: not UTF-8"]),
    "a csv not in UTF-8": ("train.csv", b"dialogue,summary\nx,caf\xe9\n", ["train.csv, line 2: not UTF-8"]),
    "half a surrogate pair": (
        "train.jsonl",
        '{"dialogue": "\\ud83d", "summary": "x"}',
        ["train.jsonl, line 1: column 'dialogue' is not Unicode text"],
    ),
    "a number for text": (
        "train.jsonl",
        '{"dialogue": "x", "summary": 7}',
        ["train.jsonl, line 1: column 'summary' holds 7 (int)"],
    ),
    "a list of turns": ("train.jsonl", '{"dialogue": ["x"], "summary": "y"}', ["column 'dialogue' holds ['x'] (list)"]),
    "a number among references": ("train.jsonl", '{"dialogue": "x", "summary": ["y", 7]}', ["'summary' holds 7 (int)"]),
    "a csv row too long": ("train.csv", "dialogue,summary\na,b\na,b,c\n", ["line 3: 3 cells", "2 columns"]),
    "a csv row too short": ("train.csv", "dialogue,summary\na\n", ["line 2: 1 cells"]),
    "an open quote": ("train.csv", 'dialogue,summary\n"a,b\nc,d\n', ["train.csv, line 3: not CSV"]),
    "a column twice": ("train.csv", "dialogue,summary,summary\na,b,c\n", ["line 1", "twice"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_clear_error(tmp_path: Path, case: str) -> None:
    name, content, fragments = BROKEN[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as raised:
        read(tmp_path)
    message = str(raised.value)
    assert str(tmp_path) in message
    assert [fragment for fragment in fragments if fragment not in message] == [], message


def test_a_real_file_cut_in_half_is_an_error(data_folder: Path, tmp_path: Path) -> None:
    whole = (data_folder / "dialogsum" / "validation.jsonl.gz").read_bytes()
    (tmp_path / "train.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train\.jsonl\.gz, after line \d+: the compressed file is truncated"):
        read(tmp_path)


def test_a_split_in_two_files_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_csv(tmp_path / "train.csv", ROWS)
    with pytest.raises(DataError, match=r"'train' twice: train\.csv and train\.jsonl"):
        splits_of(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere-at-all", "a/b/c", "nowhere/", "../nowhere"])
def test_a_path_that_is_no_folder_never_asks_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralab.data.sources.from_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="there is no such folder"):
        read_split(name, "train", "dialogue", "summary")


def test_a_file_in_place_of_its_folder_names_the_folder(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match="is a file") as raised:
        splits_of(str(path))
    assert f"{tmp_path}?" in str(raised.value)


# The hub, without a network.


def test_hub_rows_pass_the_same_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"dialogue": row["dialogue"], "summary": [row["summary"]]} for row in ROWS]
    table = datasets.Dataset.from_list([*rows, {"dialogue": None, "summary": ["s"]}])
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    got = read_split("owner/name", "test", "dialogue", "summary")
    assert asked == [("owner/name", "test")]
    assert [example.source for example in got.examples] == [row["dialogue"].replace("\r\n", "\n") for row in ROWS]
    assert [example.targets for example in got.examples] == [(row["summary"],) for row in ROWS]
    assert got.skipped_empty == (4,)
    with pytest.raises(
        DataError, match=r"owner/name, split 'test', row 1: no column 'dialog' \(Did you mean 'dialogue'"
    ):
        read_split("owner/name", "test", "dialog", "summary")


def test_a_hub_that_cannot_be_reached_is_one_clear_error() -> None:
    for ask in (
        lambda: read_split("nobody/nothing", "train", "dialogue", "summary"),
        lambda: splits_of("nobody/nothing"),
    ):
        with pytest.raises(
            DataError, match="nobody/nothing: there is no folder of this name, and the hub did not give"
        ):
            ask()


# Prompts.


def test_braces_in_data_and_doubled_braces_are_plain_characters() -> None:
    prompt = Prompt('{{"text": "{dialogue}"}}', "dialogue")
    assert prompt.fill("{0} {dialogue} }{ %s") == '{"text": "{0} {dialogue} }{ %s"}'
    assert (Prompt("summarize: {source}").prefix, Prompt("summarize: {source}", "document").suffix) == (
        "summarize: ",
        "",
    )
    assert Prompt(INSTRUCTION, "dialogue").fill("x") == "Summarize the following conversation.\n\nx\n\nSummary: "


BAD_TEMPLATES = {
    "Summarize.": ["{dialogue} exactly once", "it has none"],
    "": ["{dialogue} exactly once"],
    "{{dialogue}}": ["it has none"],
    "{dialog}": ["unknown placeholder {dialog}", "Did you mean 'dialogue'?"],
    "{}": ["unknown placeholder {}", "dialogue, source"],
    "{dialogue.upper}": ["unknown placeholder {dialogue.upper}"],
    "{dialogue!r}": ["unknown placeholder {dialogue!r}"],
    "{dialogue:>9}": ["unknown placeholder {dialogue:>9}"],
    "{dialogue} {dialogue}": ["exactly once", "it has {dialogue} and {dialogue}"],
    "{dialogue} {source}": ["exactly once", "it has {dialogue} and {source}"],
    "{dialogue": ["unbalanced brace"],
    "dialogue}": ["unbalanced brace"],
    "{dialogue} {": ["unbalanced brace"],
}


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_a_bad_template_is_one_clear_error(template: str) -> None:
    with pytest.raises(RecipeError) as raised:
        Prompt(template, "dialogue")
    message = str(raised.value)
    assert [fragment for fragment in BAD_TEMPLATES[template] if fragment not in message] == [], message


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_whole_rows_are_the_tokenizers_own_ids(name: str, tokenizers: dict[str, Any], dialogues: Split) -> None:
    prompt = Prompt(INSTRUCTION, "dialogue")
    sources = [example.source for example in dialogues.examples]
    rows, num_cut = encode_sources(sources, tokenizers[name], prompt, 4096)
    assert num_cut == 0
    for row, source in zip(rows, sources, strict=True):
        text = f"Summarize the following conversation.\n\n{source}\n\nSummary: "
        assert row == tokenizers[name](text, verbose=False).input_ids


def test_a_cut_row_keeps_prefix_suffix_and_end(t5: Any, dialogues: Split) -> None:
    prompt = Prompt(INSTRUCTION, "dialogue")
    prefix, suffix = t5(prompt.prefix).input_ids[:-1], t5(prompt.suffix).input_ids
    assert t5.decode(suffix) == "Summary:</s>"
    sources = [example.source for example in dialogues.examples]
    whole = t5([prompt.fill(source) for source in sources], verbose=False).input_ids
    rows, num_cut = encode_sources(sources, t5, prompt, 128)
    assert num_cut == sum(len(ids) > 128 for ids in whole) > 300
    for row, ids in zip(rows, whole, strict=True):
        assert len(row) <= 128
        assert row == ids if len(ids) <= 128 else row[-len(suffix) :] == suffix
        source_ids = row[len(prefix) : -len(suffix)]
        assert row[: len(prefix)] == prefix
        assert source_ids == ids[len(prefix) :][: len(source_ids)]
    # only a token that is nothing without its successor (a lone word boundary) may be given up
    assert all(len(row) >= 126 for row, ids in zip(rows, whole, strict=True) if len(ids) > 128)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
@pytest.mark.parametrize("template", [INSTRUCTION, "summarize: {dialogue}", "«{dialogue}»TL;DR"])
def test_no_longer_cut_at_a_token_would_fit(
    name: str, template: str, tokenizers: dict[str, Any], data_folder: Path
) -> None:
    """Against brute force over every token end, on chats with emoji (several tokens a character in GPT-2)."""
    tokenizer, prompt = tokenizers[name], Prompt(template, "dialogue")
    num_cut = 0
    for example in read(data_folder / "samsum", "validation", max_rows=60).examples:
        source = example.source + " 😀🎉"
        whole = tokenizer(prompt.fill(source), return_offsets_mapping=True)
        for limit in {48, len(whole.input_ids) - 1}:
            if not 48 <= limit < len(whole.input_ids):
                continue
            num_cut += 1
            ends = {end - len(prompt.prefix) for _, end in whole.offset_mapping}
            cuts = [source[:end] for end in sorted(ends) if 0 < end < len(source)]
            fitting = [ids for ids in tokenizer([prompt.fill(cut) for cut in cuts]).input_ids if len(ids) <= limit]
            assert prompt.cut(source, tokenizer, limit) == fitting[-1]
    assert num_cut > 50


def test_without_a_suffix_the_cut_is_the_tokenizers_own_truncation(t5: Any, dialogues: Split) -> None:
    prompt = Prompt("summarize: {dialogue}", "dialogue")
    sources = [example.source for example in dialogues.examples]
    rows, num_cut = encode_sources(sources, t5, prompt, 100)
    truncated = t5([prompt.fill(source) for source in sources], truncation=True, max_length=100).input_ids
    word_boundary = t5.convert_tokens_to_ids(
        "▁"
    )  # alone before the end it stands for no text, and the cut leaves it out
    expected = [[*ids[:-2], ids[-1]] if ids[-2] == word_boundary else ids for ids in truncated]
    assert num_cut > 400
    assert rows == expected


def test_a_prompt_that_leaves_no_room_is_an_error(t5: Any) -> None:
    prompt = Prompt(INSTRUCTION, "dialogue")
    num_tokens = len(t5(prompt.fill("")).input_ids)
    with pytest.raises(DataError, match=f"The prompt alone takes {num_tokens} tokens.* max_source_length {num_tokens}"):
        encode_sources(["hello there"], t5, prompt, num_tokens)
    assert encode_sources(["hello there"], t5, prompt, num_tokens + 1) == ([t5(prompt.fill("hello")).input_ids], 1)


# Encoding.


def test_encoded_split_holds_each_row(t5: Any, dialogues: Split) -> None:
    prompt = Prompt(INSTRUCTION, "dialogue")
    encoded = encode(dialogues, t5, prompt, 256, 48)
    sources, cut_sources = encode_sources([example.source for example in dialogues.examples], t5, prompt, 256)
    whole = [t5(example.targets[0]).input_ids for example in dialogues.examples]
    targets = t5([example.targets[0] for example in dialogues.examples], truncation=True, max_length=48).input_ids
    assert len(encoded) == len(dialogues) == 500
    assert (encoded.source_ids.dtype, encoded.target_ids.dtype) == (np.int32, np.int32)
    assert (encoded.max_source_length, encoded.max_target_length) == (256, 48)
    assert [encoded.source(i).tolist() for i in range(500)] == sources
    assert [encoded.target(i).tolist() for i in range(500)] == targets
    np.testing.assert_array_equal(encoded.source_lengths, [len(ids) for ids in sources])
    np.testing.assert_array_equal(encoded.target_lengths, [len(ids) for ids in targets])
    assert encoded.cut_sources == cut_sources > 0
    assert encoded.cut_targets == sum(len(ids) > 48 for ids in whole) > 0


def test_chunks_do_not_show(t5: Any, dialogues: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Prompt(INSTRUCTION, "dialogue")
    whole = encode(dialogues, t5, prompt, 128, 32)
    monkeypatch.setattr("loralab.data.encode.CHUNK_ROWS", 7)
    chunked = encode(dialogues, t5, prompt, 128, 32)
    for name in ("source_ids", "source_offsets", "target_ids", "target_offsets"):
        np.testing.assert_array_equal(getattr(chunked, name), getattr(whole, name))


def split_of(*rows: tuple[str, ...]) -> Split:
    """A split of (source, reference, reference, ...) rows."""
    return Split("name", "train", tuple(Example(n, row[0], row[1:]) for n, row in enumerate(rows, 1)), (), "")


def test_targets_are_the_first_reference_and_end_even_where_the_tokenizer_ends_nothing(
    tokenizers: dict[str, Any],
) -> None:
    gpt2 = tokenizers["gpt2"]
    split = split_of(("x", "a short text", "another"), ("x", "one two three four five six"))
    encoded = encode(split, gpt2, Prompt("{source}"), 8, 5)
    assert encoded.target(0).tolist() == [*gpt2("a short text").input_ids, gpt2.eos_token_id]
    assert encoded.target(1).tolist() == [*gpt2("one two three four").input_ids, gpt2.eos_token_id]
    assert encoded.cut_targets == 1


def test_a_tokenizer_that_cannot_serve_is_an_error(tokenizers: dict[str, Any], data_folder: Path) -> None:
    from transformers import AutoTokenizer

    bert = AutoTokenizer.from_pretrained(data_folder / "tokenizers" / "bert-base-uncased")
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        encode(split_of(("a", "b")), bert, Prompt("{source}"), 8, 8)

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow gives no character offsets"):
        encode(split_of(("a", "b")), Slow(), Prompt("{source}"), 8, 8)  # type: ignore[arg-type]


@pytest.mark.slow
def test_percentiles_of_samsum_are_the_published_lengths(t5: Any, data_folder: Path) -> None:
    train = read(data_folder / "samsum")
    assert resolve_lengths(train, t5, "p85", "p90") == (255, 50)
    assert resolve_lengths(train, t5, 300, "p90") == (300, 50)


def test_a_percentile_is_rounded_up_and_capped() -> None:
    lengths = np.array([10, 20, 31, 600, 2000])
    assert resolve_length("p50", lengths) == 31
    assert resolve_length("p40", lengths) == 27  # 26.6
    assert resolve_length("p75", lengths) == resolve_length("p100", lengths) == 512
    assert resolve_length(700, lengths) == 700


@pytest.mark.parametrize("setting", [0, -1, "85", "p0", "p101", "p8.5", "P85", "p85 ", "", None])
def test_a_length_that_is_none_is_an_error(setting: Any) -> None:
    with pytest.raises(RecipeError, match="neither a number of tokens"):
        resolve_length(setting, np.array([1, 2, 3]))


# Batches.


def tokens_of(batches: list[np.ndarray], lengths: np.ndarray) -> int:
    return sum(len(rows) * int(lengths[rows].max()) for rows in batches)


def assert_each_row_once(batches: list[np.ndarray], num_rows: int) -> None:
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(num_rows))


def random_lengths(num_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 400, num_rows), rng.integers(1, 90, num_rows)


PLANS: list[dict[str, Any]] = [
    {"tokens_per_batch": tokens, "batch_size": rows, "seed": seed, "epoch": epoch}
    for tokens, rows in ((2048, None), (None, 8))
    for seed, epoch in ((0, 0), (0, 1), (7, 0))
]


@pytest.mark.parametrize("num_rows", [1, 2, 9, 64, 1001])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_plan_holds_each_row_once_within_its_budget(num_rows: int, plan: dict[str, Any]) -> None:
    source, target = random_lengths(num_rows)
    batches = plan_batches(source, target, **plan)
    assert_each_row_once(batches, num_rows)
    if plan["batch_size"]:
        assert sorted(map(len, batches))[1:] == [8] * ((num_rows - 1) // 8)
    else:
        assert all(len(rows) * (source[rows].max() + target[rows].max()) <= 2048 for rows in batches)


def test_a_row_beyond_the_budget_makes_its_own_batch() -> None:
    source, target = np.array([10, 3000, 10, 900, 10]), np.array([5, 5, 5, 200, 5])
    for batches in (
        plan_batches(source, target, tokens_per_batch=1000, batch_size=None, seed=0, epoch=0),
        evaluation_batches(source, target, tokens_per_batch=1000),
    ):
        assert {1, 3} <= {rows[0] for rows in batches if len(rows) == 1}
        assert_each_row_once(batches, 5)


def test_a_plan_is_a_function_of_its_arguments_alone() -> None:
    source, target = random_lengths(500)

    def plan(seed: int, epoch: int) -> list[list[int]]:
        batches = plan_batches(source, target, tokens_per_batch=2048, batch_size=None, seed=seed, epoch=epoch)
        return [rows.tolist() for rows in batches]

    first = plan(3, 1)
    np.random.seed(0)  # the global state is no argument
    assert plan(3, 1) == first
    assert len({str(plan(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


@pytest.mark.slow
def test_real_batches_are_full_and_in_no_order_of_length(train_lengths: tuple[np.ndarray, np.ndarray]) -> None:
    source, target = train_lengths
    random_rows = np.random.default_rng(0).permutation(len(source))
    by_eight = [random_rows[start : start + 8] for start in range(0, len(source), 8)]
    assert 0.58 < source.sum() / tokens_of(by_eight, source) < 0.61  # what grouping by length saves
    for tokens_per_batch, batch_size, useful_source, useful_target in ((4096, None, 0.96, 0.88), (None, 8, 0.96, 0.88)):
        batches = plan_batches(
            source, target, tokens_per_batch=tokens_per_batch, batch_size=batch_size, seed=42, epoch=0
        )
        assert source.sum() / tokens_of(batches, source) >= useful_source
        assert target.sum() / tokens_of(batches, target) >= useful_target
        longest = np.array([source[rows].max() for rows in batches])
        assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.1  # a batch says nothing of the next one's length


def kept_company(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """The share of pairs of rows in one batch of `first` that share one of `second` too."""
    batch_of = {row: number for number, rows in enumerate(second) for row in rows.tolist()}
    pairs = [(a, b) for rows in first for a in rows.tolist() for b in rows.tolist() if a < b]
    return sum(batch_of[a] == batch_of[b] for a, b in pairs) / len(pairs)


@pytest.mark.slow
@pytest.mark.parametrize(("num_rows", "limit"), [(12_460, 0.12), (1000, 0.3), (200, 0.4)])
def test_rows_meet_others_in_the_next_epoch(
    train_lengths: tuple[np.ndarray, np.ndarray], num_rows: int, limit: float
) -> None:
    source, target = train_lengths[0][:num_rows], train_lengths[1][:num_rows]
    epochs = [
        plan_batches(source, target, tokens_per_batch=4096, batch_size=None, seed=42, epoch=epoch) for epoch in range(4)
    ]
    pairs = list(combinations(epochs, 2))
    assert np.mean([kept_company(first, second) for first, second in pairs]) < limit
    for first, second in pairs:
        sets = [{frozenset(rows.tolist()) for rows in plan if len(rows) > 1} for plan in (first, second)]
        assert not sets[0] & sets[1]


def test_evaluation_starts_with_the_longest_sources() -> None:
    source, target = random_lengths(700)
    batches = evaluation_batches(source, target, tokens_per_batch=2048)
    assert_each_row_once(batches, 700)
    np.testing.assert_array_equal(source[np.concatenate(batches)], np.sort(source)[::-1])
    assert all(len(rows) * (source[rows].max() + target[rows].max()) <= 2048 for rows in batches)
    budget_of_longer = [
        (len(a) + 1) * (source[a].max() + max(target[a].max(), target[b[0]])) for a, b in pairwise(batches)
    ]
    assert min(budget_of_longer) > 2048  # no batch could have taken the next row


# Collation.


def padded_by_hand(rows: list[list[int]], value: int) -> list[list[int]]:
    longest = max(len(row) for row in rows)
    return [row + [value] * (longest - len(row)) for row in rows]


@pytest.fixture(scope="module")
def encoded(t5: Any, dialogues: Split) -> EncodedSplit:
    return encode(dialogues, t5, Prompt(INSTRUCTION, "dialogue"), 512, 128)


def test_collated_rows_are_the_encoded_rows(encoded: EncodedSplit) -> None:
    for rows in evaluation_batches(encoded.source_lengths, encoded.target_lengths, tokens_per_batch=4096):
        batch = collate(encoded, rows, pad_id=0)
        sources = [encoded.source(i).tolist() for i in rows]
        targets = [encoded.target(i).tolist() for i in rows]
        np.testing.assert_array_equal(batch.rows, rows)
        np.testing.assert_array_equal(batch.source_ids, padded_by_hand(sources, 0))
        np.testing.assert_array_equal(batch.source_mask, padded_by_hand([[1] * len(row) for row in sources], 0))
        np.testing.assert_array_equal(batch.labels, padded_by_hand(targets, -100))
        assert (batch.source_ids.dtype, batch.source_mask.dtype, batch.labels.dtype) == (np.int64, np.bool_, np.int64)
        assert batch.num_source_tokens == sum(map(len, sources))
        assert batch.num_target_tokens == sum(map(len, targets))


def test_a_padding_token_in_the_text_is_a_real_token(t5: Any) -> None:
    encoded = encode(split_of(("a<pad>b", "c<pad>"), ("one two three four five", "d")), t5, Prompt("{source}"), 32, 32)
    batch = collate(encoded, np.array([0, 1]), pad_id=t5.pad_token_id)
    assert t5.pad_token_id in encoded.source(0) and t5.pad_token_id in encoded.target(0)
    np.testing.assert_array_equal(batch.source_mask.sum(axis=1), encoded.source_lengths)
    np.testing.assert_array_equal((batch.labels != -100).sum(axis=1), encoded.target_lengths)
    assert batch.num_target_tokens == encoded.target_lengths.sum()

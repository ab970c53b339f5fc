"""From text to token ids: the rows of a split become an `EncodedSplit`, flat arrays with offsets.

Rows are tokenised once: the arrays stand in the cache, named by the hash of the texts and of all that tokens depend on,
and are mapped from there. Rows pass through memory a thousand at a time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from loralab.console.progress import Progress
from loralab.data.cache import ArrayFile, Facts, cached
from loralab.data.chat_template import Chat, encode_answers, encode_conversation
from loralab.data.prompts import Prompt
from loralab.data.rows import Example, Findings
from loralab.data.splits import AnySplit
from loralab.data.text_pairs import EncodedPair, PairPrompt, encode_pairs, has_token_types
from loralab.data.tokenized_split import EncodedSplit
from loralab.errors import DataError, ModelError
from loralab.metrics.labels import RegressionOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 1000  # rows a call of the tokenizer: enough for its threads, little memory
NO_LIMIT = 2**31
NO_LENGTHS: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
ARRAYS = {"source_ids": "<i4", "source_offsets": "<i8", "target_ids": "<i4", "target_offsets": "<i8", "kept": "<i8"}


def encode(
    rows: AnySplit,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Chat,
    max_source_length: int,
    max_target_length: int,
    long_rows: str = "cut",
) -> EncodedSplit:
    """Token ids of every row: the prompt around its source, and its first reference.

    Lengths are tokens; `resolve_lengths` makes them of a recipe's "p85". Of a row that is too long, the source within
    the prompt is cut, and the target before its end-of-sequence token ("cut"); or the row is left out ("skip"); or it is
    a `DataError`, once all of them are counted ("stop").
    """
    limits = max_source_length, max_target_length
    texts: dict[str, object] = {
        "texts": rows.content_hash,
        "prompt": repr(prompt),
        "limits": limits,
        "long_rows": long_rows,
    }
    key = texts | tokenizer_key(tokenizer)
    entry = cached("tokens", key, lambda folder: write_tokens(folder, rows, tokenizer, prompt, limits, long_rows))
    arrays, numbers = {name: entry.array(name) for name in arrays_of(prompt, tokenizer)}, rows.numbers
    return EncodedSplit(
        numbers=numbers[arrays.pop("kept")],
        **arrays,
        max_source_length=max_source_length,
        max_target_length=max_target_length,
        findings=Findings.from_json(entry.facts["findings"]).in_file(numbers),
        reused=entry.reused,
        shots=None,
    )


def arrays_of(prompt: Prompt | Chat, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns the arrays that are stored, with their dtypes."""
    labels = prompt.labels if isinstance(prompt, Prompt) else None
    numbers = {"target_ids": "<f4"} if isinstance(labels, RegressionOutput) else {}
    pairs = {"second": "<i4"} if isinstance(prompt, PairPrompt) and has_token_types(tokenizer) else {}
    return ARRAYS | numbers | pairs


def write_tokens(
    folder: Path,
    rows: AnySplit,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Chat,
    limits: tuple[int, int],
    long_rows: str,
) -> Facts:
    """The arrays of an `EncodedSplit`, written as the rows pass by; which of them were too long, counted from 0."""
    findings, progress, done = Findings(), Progress("tokenise", len(rows)), 0
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(ArrayFile(folder / f"{name}.npy", dtype))
            for name, dtype in arrays_of(prompt, tokenizer).items()
        }
        ends = {"source": 0, "target": 0}
        for side in ends:
            files[f"{side}_offsets"].append([0])
        for examples in chunks(rows, CHUNK_ROWS):
            columns, long = encode_chunk(examples, tokenizer, prompt, limits, cut=long_rows == "cut")
            for kind in long:
                for i in long[kind]:
                    findings.note(kind, done + i)
            left_out = set(chain.from_iterable(long.values())) if long_rows != "cut" else set()
            kept = [i for i in range(len(examples)) if i not in left_out]
            if "second" in columns:
                files["second"].append([columns["second"][i] for i in kept])
            for side in ends:
                ids, offsets = flat([columns[side][i] for i in kept], files[f"{side}_ids"].dtype)
                files[f"{side}_ids"].append(ids)
                files[f"{side}_offsets"].append(offsets[1:] + ends[side])
                ends[side] += len(ids)
            files["kept"].append([done + i for i in kept])
            progress.update(done := done + len(examples))
        check_long_rows(rows, findings, long_rows, files["kept"].length)
    return {"findings": findings.as_json()}


def encode_chunk(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Chat,
    limits: tuple[int, int],
    cut: bool,
) -> tuple[dict[str, list[Any]], dict[str, list[int]]]:
    """({"source" and "target": ids of each row}, {"long_sources" and "long_targets": places of rows beyond the limits})."""

    def sources(texts: list[str], limit: int) -> list[list[int]]:
        return encode_sources(texts, tokenizer, prompt, limit)[0]

    def targets(texts: list[str], limit: int) -> list[list[int]]:
        return encode_targets(texts, tokenizer, limit, prompt)[0]

    if isinstance(prompt, PairPrompt):
        return encode_pair_chunk(examples, tokenizer, prompt, limits[0], cut)
    source_ids, long_sources = truncated(sources, [example.source for example in examples], limits[0], cut)
    if isinstance(prompt, Prompt) and prompt.labels is not None:
        places = [prompt.labels.targets(example.targets[0]) for example in examples]
        return {"source": source_ids, "target": places}, {"long_sources": long_sources, "long_targets": []}
    target_ids, long_targets = truncated(targets, [example.targets[0] for example in examples], limits[1], cut)
    return {"source": source_ids, "target": target_ids}, {"long_sources": long_sources, "long_targets": long_targets}


def encode_pair_chunk(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, prompt: PairPrompt, limit: int, cut: bool
) -> tuple[dict[str, list[Any]], dict[str, list[int]]]:
    """Encodes rows of two texts; as `encode_chunk`, with the place of each row's first token of type 1 as "second"."""

    def pairs(texts: list[str], limit: int) -> list[EncodedPair]:
        return encode_pairs(texts, tokenizer, None if limit == NO_LIMIT else limit)

    assert prompt.labels is not None
    rows, long = truncated(pairs, [example.source for example in examples], limit, cut)
    columns: dict[str, list[Any]] = {
        "source": [row.ids for row in rows],
        "target": [prompt.labels.targets(example.targets[0]) for example in examples],
    }
    if has_token_types(tokenizer):
        columns["second"] = [row.second for row in rows]
    return columns, {"long_sources": long, "long_targets": []}


class Sized(Protocol):
    """Tokens of a text."""

    def __len__(self) -> int: ...


Tokens = TypeVar("Tokens", bound=Sized)


def truncated(
    encode_texts: Callable[[list[str], int], list[Tokens]], texts: list[str], limit: int, cut: bool
) -> tuple[list[Tokens], list[int]]:
    """(tokens of each text, places of those over the limit, which are cut to it on demand)."""
    ids = encode_texts(texts, NO_LIMIT)
    long = [i for i, row in enumerate(ids) if len(row) > limit]
    if long and cut:
        for i, shorter in zip(long, encode_texts([texts[i] for i in long], limit), strict=True):
            ids[i] = shorter
    return ids, long


def check_long_rows(rows: AnySplit, findings: Findings, long_rows: str, num_kept: int) -> None:
    """Raises `DataError` where over-long rows are to stop the run, or none but such are there."""
    title = f"{rows.name}, {rows.split}"
    findings.in_file(rows.numbers).stop(title, {"long_rows": long_rows})
    if not num_kept:
        raise DataError(f"{title}: all {len(rows)} rows are longer than max_source_length or max_target_length allow.")


def chunks(rows: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """The rows in lists of `size`, one list in memory at a time."""
    passing = iter(rows)
    while chunk := list(islice(passing, size)):
        yield chunk


def encode_sources(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt: Prompt | Chat, max_length: int
) -> tuple[list[list[int]], int]:
    """The token ids of each prompt, at most `max_length` of them, and how many sources were cut.

    A decoder-only model goes on from the last of them, so that no end of sequence follows. A plain text begins with the start
    where the tokenizer adds none; that is its start or else its end token.
    """
    if isinstance(prompt, Chat):
        conversations = [encode_conversation(source, tokenizer, max_length) for source in sources]
        return [ids for ids, _ in conversations], sum(cut for _, cut in conversations)
    probe = next(token_ids(["a"], tokenizer))
    surplus = int(prompt.causal and probe[-1] == tokenizer.eos_token_id)
    start = [start_token(tokenizer)] if prompt.begins else []
    start = [] if start == probe[:1] else start  # the tokenizer adds it
    rows, num_cut, room = list[list[int]](), 0, max_length - len(start)
    for source, ids in zip(sources, token_ids([prompt.fill(source) for source in sources], tokenizer), strict=True):
        too_long = len(ids) - surplus > room
        num_cut += too_long
        ids = prompt.cut(source, tokenizer, room + surplus) if too_long else ids
        rows.append([*start, *ids[: len(ids) - surplus]])
    return rows, num_cut


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ModelError(
            "The tokenizer has neither a start nor an end token, with which a text without a source begins."
        )
    return int(start)


def encode_targets(
    targets: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    prompt: Prompt | Chat | None = None,
) -> tuple[list[list[int]], int]:
    """The token ids of each target, at most `max_length` with the end of sequence, and how many were cut.

    For a decoder-only model, as `prompt` says, no start precedes them; in a chat the end is that of the assistant's turn.
    """
    end = prompt.end if isinstance(prompt, Chat) else tokenizer.eos_token_id
    if end is None:
        raise ModelError("The tokenizer has no end-of-sequence token, so a model cannot learn where a target ends.")
    rows: list[list[int]] = []
    num_cut = 0
    for ids in target_ids(targets, tokenizer, prompt):
        closed = ids if ids[-1:] == [end] else [*ids, end]
        num_cut += len(closed) > max_length
        rows.append(closed if len(closed) <= max_length else [*closed[: max_length - 1], end])
    return rows, num_cut


def target_ids(
    targets: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt: Prompt | Chat | None
) -> Iterator[list[int]]:
    if isinstance(prompt, Chat):
        for start in range(0, len(targets), CHUNK_ROWS):
            yield from encode_answers(targets[start : start + CHUNK_ROWS], tokenizer, prompt)
    else:
        yield from token_ids(targets, tokenizer, special=prompt is None or not prompt.causal)


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, special: bool = True) -> Iterator[list[int]]:
    """`special`: with the tokens that the tokenizer adds around a text."""
    check_fast(tokenizer)
    for start in range(0, len(texts), CHUNK_ROWS):
        chunk = list(texts[start : start + CHUNK_ROWS])
        yield from tokenizer(chunk, add_special_tokens=special, verbose=False, return_attention_mask=False)["input_ids"]


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ModelError` for a tokenizer that is not one of the library `tokenizers`."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} gives no character offsets. "
            "A fast tokenizer is needed, one with a tokenizer.json."
        )


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """All that a tokenizer's output depends on: its tokenizer.json, its end of sequence, its template, its libraries."""
    check_fast(tokenizer)
    tokenizer("", verbose=False)  # forgets the padding and truncation that another call has asked for
    return {
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "start and end": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "template": tokenizer.chat_template,
        "libraries": [importlib.metadata.version(library) for library in ("tokenizers", "transformers")],
    }


def flat(rows: Sequence[Sequence[float]], dtype: Any = np.int32) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """(all rows one after the other, n + 1 offsets)."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return np.fromiter(chain.from_iterable(rows), dtype=dtype, count=int(offsets[-1])), offsets

"""What is written, token by token, held against Transformers' `generate`: greedy, by beam search, with a penalty."""

from __future__ import annotations

import gzip
import inspect
import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generation_cases import make_ending_t5, random_sources
from safetensors.torch import load_file, save_file
from sizes import sized
from tiny import CPU, LAYOUTS, make_gpt2, make_t5, ours, theirs
from torch import Tensor
from transformers import T5ForConditionalGeneration

from loralab import LoRASpec, UserError, attach, load_model
from loralab.config.generation import Decoding
from loralab.on_torch.generation.generate import generate, generate_ids, pad
from loralab.on_torch.loading.load import load_weights
from loralab.on_torch.models import kv_cache as written
from loralab.on_torch.models.registry import family_of
from loralab.on_torch.models.t5 import T5
from loralab.on_torch.models.t5_decoding import start


def expected(
    model: Any, sources: list[list[int]], max_new_tokens: int, beams: int = 1, **settings: Any
) -> list[list[int]]:
    """What Transformers writes, between the start and the end."""
    answers, end = [], model.generation_config.eos_token_id
    for first in range(0, len(sources), 50):
        ids, mask = pad(sources[first : first + 50], 0, CPU)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            num_beams=beams,
            do_sample=False,
            **settings,
        )
        answers += [row[: row.index(end)] if end in row else row for row in output[:, 1:].tolist()]
    return answers


# A trained model and real text


@pytest.fixture(scope="module")
def trained(data_folder: Path) -> tuple[T5, T5ForConditionalGeneration, list[list[int]]]:
    """The trained model as ours and as Transformers', and its 200 shortest dialogues."""
    folder = data_folder / "models/chat-t5-mini"
    model, tokenizer = load_model(str(folder), dtype="float32", device="cpu")
    assert isinstance(model, T5)
    with gzip.open(data_folder / "dialogsum/validation.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [f"Summarize the following conversation.\n\n{json.loads(x)['dialogue']}\n\nSummary: " for x in lines]
    sources = sorted((tokenizer(text).input_ids for text in texts), key=len)[:200]
    return model, theirs(folder), sources


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 4])
def test_real_dialogues_are_answered_as_transformers_does(beams: int, trained: tuple[Any, ...]) -> None:
    mine, other, every = trained
    sources = every[sized(0, 3) :: sized(1, 5)]
    answers = generate_ids(mine, sources, Decoding(max_new_tokens=32, beams=beams), 0)
    assert answers == expected(other, sources, 32, beams)
    ended = sum(len(answer) < 32 for answer in answers)
    assert 0 < ended < len(answers), "some rows end and some are cut: both are covered"


BEAM_SETTINGS: list[dict[str, Any]] = [
    {"length_penalty": 0.6},
    {"length_penalty": 2.0},
    {"early_stopping": True},
    {"early_stopping": "never"},
    {"repetition_penalty": 1.3},
]


@pytest.mark.parametrize("settings", BEAM_SETTINGS, ids=str)
def test_length_penalty_stopping_and_repetition_on_real_dialogues(
    settings: dict[str, Any], trained: tuple[Any, ...]
) -> None:
    mine, other, sources = trained
    plain, answers = (
        generate_ids(mine, sources[:12], Decoding(max_new_tokens=20, beams=4, **each), 0) for each in ({}, settings)
    )
    assert answers == expected(other, sources[:12], 20, 4, **settings)
    assert answers != plain, "the setting does something"


# Tiny random models: every combination, long enough to be cut, and ties


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_combination_of_settings_equals_transformers(layout: str, tmp_path: Path) -> None:
    folder = make_ending_t5(tmp_path / "t5", layout)
    mine, other, sources = ours(folder), theirs(folder), random_sources(7)
    ended = 0
    for beams, power, stop, penalty in product((2, 5), (-1.0, 0.0, 3.0), (False, True, "never"), (1.0, 1.5)):
        settings = {"length_penalty": power, "early_stopping": stop, "repetition_penalty": penalty}
        answers = generate_ids(mine, sources, Decoding(max_new_tokens=12, beams=beams, **settings), 0)
        assert answers == expected(other, sources, 12, beams, **settings), settings
        ended += sum(len(answer) < 12 for answer in answers)
    for penalty in (0.8, 1.0, 1.5):
        answers = generate_ids(mine, sources, Decoding(max_new_tokens=12, repetition_penalty=penalty), 0)
        assert answers == expected(other, sources, 12, repetition_penalty=penalty)
    assert ended > 50, "many answers end before they are cut"


@pytest.mark.parametrize("beams", [1, 2, 4, 7])
def test_equal_scores_are_ordered_as_transformers_orders_them(beams: int, tmp_path: Path) -> None:
    """Each token's row of the head stands there four times, the end's too: whatever is chosen is chosen among equals."""
    folder = make_ending_t5(tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"]
    weights["lm_head.weight"] = head[: len(head) // 4].repeat_interleave(4, 0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    mine, other, sources = ours(folder), theirs(folder), random_sources(12)
    logits = start(mine, torch.tensor(sources[:1]), None, 1).next_logits(torch.tensor([0]))
    assert torch.equal(logits[:, 0::4], logits[:, 3::4])
    assert generate_ids(mine, sources, Decoding(max_new_tokens=12, beams=beams), 0) == expected(
        other, sources, 12, beams
    )


# What our own way of doing it promises


@pytest.mark.parametrize("settings", [{}, {"beams": 4}, {"sample": True}], ids=str)
def test_a_row_is_answered_the_same_in_any_company(settings: dict[str, Any], tmp_path: Path) -> None:
    model, sources = ours(make_ending_t5(tmp_path / "t5")), random_sources(20)
    decoding = Decoding(max_new_tokens=12, **settings)
    together = generate_ids(model, sources, decoding, 0)
    assert len({len(answer) for answer in together}) > 2, "rows leave at different steps"
    others = [sources[row] if row % 3 else [2, 3] for row in range(20)]
    apart = generate_ids(model, others, decoding, 0)
    assert [apart[row] for row in range(20) if row % 3] == [together[row] for row in range(20) if row % 3]


def test_the_sources_keys_and_values_are_never_copied_for_a_beam(tmp_path: Path) -> None:
    model = ours(make_t5(tmp_path / "t5"))
    ids, mask = pad(random_sources(3), 0, CPU)
    cache = start(model, ids, mask, 6, beams=4)
    before = [tensor.data_ptr() for each in cache.cross for tensor in (each.keys, each.values)]
    assert all(len(tensor) == 3 for each in cache.cross for tensor in (each.keys, each.values))
    assert all(len(tensor) == 12 for each in cache.own for tensor in (each.keys, each.values))
    for _ in range(3):
        assert cache.next_logits(torch.randint(2, 120, (12,))).shape == (12, 120)
        cache.reorder(torch.randint(0, 4, (12,)) + torch.arange(3).repeat_interleave(4) * 4)
    assert before == [tensor.data_ptr() for each in cache.cross for tensor in (each.keys, each.values)]


def test_steps_with_beams_equal_one_pass_over_the_whole_target(tmp_path: Path) -> None:
    """Each hypothesis of each source gets the logits that the model's forward gives it."""
    model, beams, steps = ours(make_t5(tmp_path / "t5")), 3, 5
    ids, mask = pad(random_sources(2), 0, CPU)
    targets = torch.randint(2, 120, (2 * beams, steps))
    cache = start(model, ids, mask, steps, beams)
    stepwise = torch.stack([cache.next_logits(targets[:, step]) for step in range(steps)], 1)
    repeated: tuple[Tensor, Tensor] = (ids.repeat_interleave(beams, 0), mask.repeat_interleave(beams, 0))
    torch.testing.assert_close(stepwise, model(*repeated, decoder_input_ids=targets).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_bags_of_rows_sum_as_products_do(queries: int, dtype: torch.dtype) -> None:
    weights, rows = torch.randn(2, 4, queries, 70).to(dtype), torch.randn(2, 4, 70, 24).to(dtype)
    exact = (weights.double() @ rows.double()).to(dtype)  # bags too sum in fp32 and round once
    torch.testing.assert_close(written.summed(weights, rows), exact)


def test_what_is_remembered_grows_and_follows_its_rows() -> None:
    keys, values = torch.randn(2, 3, 2, written.MORE + 3, 4)
    memory = written.KVCache(keys[:, :, :2], values[:, :, :2])
    rows = torch.tensor([2, 2, 0])
    for place in range(2, keys.shape[2]):
        memory.append(keys[:, :, [place]], values[:, :, [place]])
        if place % 40 == 0:
            memory.reorder(rows)
            keys, values = keys[rows], values[rows]
    memory.keep(torch.tensor([True, False, True]))
    length = memory.length
    assert length == written.MORE + 3
    assert torch.equal(memory.keys[..., :length].transpose(-1, -2), keys[[0, 2]])
    assert torch.equal(memory.values[:, :, :length], values[[0, 2]])
    assert not memory.keys[..., length:].any() and not memory.values[:, :, length:].any()


@pytest.mark.parametrize("bags", [True, False], ids=["by bags", "by products"])
@pytest.mark.parametrize("beams", [1, 4, 10])
@pytest.mark.parametrize("make", [make_t5, make_gpt2])
def test_steps_in_bf16(make: Any, beams: int, bags: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to fp32 as the forward in bf16 is."""
    monkeypatch.setattr(written, "BAGS", bags)
    folder, steps = make(tmp_path / "model"), 5
    models = [load_weights(folder, dtype, CPU).eval() for dtype in (torch.float32, torch.bfloat16)]
    sources = random_sources(2, 97)
    ids, mask = pad(sources, 0, CPU, "right" if make is make_t5 else "left")
    targets = torch.randint(2, 97, (2 * beams, steps))
    repeated = ids.repeat_interleave(beams, 0), mask.repeat_interleave(beams, 0)

    def in_one_pass(model: Any) -> Tensor:
        if make is make_t5:
            return model(*repeated, decoder_input_ids=targets).logits.float()
        whole = torch.cat([repeated[0][:, :-1], targets], 1)
        real = torch.cat([repeated[1][:, :-1], torch.ones_like(targets)], 1)
        return model(whole, real).logits[:, -steps:].float()

    with torch.no_grad():
        exact, rounded = map(in_one_pass, models)
        memory = family_of(models[1]).start_decoding(models[1], ids, mask, steps, beams)
        stepwise = torch.stack([memory.next_logits(targets[:, step]) for step in range(steps)], 1)
    assert (stepwise - exact).norm() < 1.5 * (rounded - exact).norm()


@pytest.mark.parametrize("settings", [{}, {"beams": 4}, {"sample": True, "top_p": 0.9}], ids=str)
def test_an_adapter_writes_the_same_merged_and_factored(settings: dict[str, Any], tmp_path: Path) -> None:
    model, sources = ours(make_t5(tmp_path / "t5", "untied")), random_sources(8)
    decoding = Decoding(max_new_tokens=12, **settings)
    base = generate_ids(model, sources, decoding, 0)
    adapter = attach(model, LoRASpec(rank=4, alpha=8, rules=["Attention.q", "Attention.k", "Attention.v", "wo"]))
    torch.manual_seed(2)
    for update in adapter.updates.values():
        torch.nn.init.normal_(update.B, std=0.2)
    factored = generate_ids(model, sources, decoding, 0)
    assert factored != base
    assert generate_ids(adapter.merge(), sources, decoding, 0) == factored


def test_a_training_model_goes_on_training(tmp_path: Path) -> None:
    model = ours(make_t5(tmp_path / "t5")).train()
    first, second = (generate_ids(model, random_sources(3), Decoding(max_new_tokens=6), 0) for _ in "ab")
    assert first == second and model.training, "nothing is dropped out while it writes"


# From Python


def test_generate_keeps_the_order_of_the_texts(data_folder: Path) -> None:
    model, tokenizer = load_model(str(data_folder / "models/chat-t5-mini"), dtype="float32", device="cpu")
    texts = ["Tom: Lunch? Ann: At one, by the lake.", "Is the report done? No.", "I lost my dog in the park today!"]
    together = generate(model, tokenizer, texts, max_new_tokens=8, beams=2)
    assert together == [generate(model, tokenizer, [text], max_new_tokens=8, beams=2)[0] for text in texts]
    assert len(set(together)) > 1 and all(together)


def test_the_functions_defaults_are_the_recipes() -> None:
    parameters = inspect.signature(generate).parameters
    given = {name: p.default for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert given.pop("max_new_tokens") is inspect.Parameter.empty
    assert given == Decoding(max_new_tokens=1).model_dump(exclude={"max_new_tokens"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be greater than 0"),
        ({"beams": 0}, "beams is 0; it must be greater than 0"),
        ({"beams": 1.5}, "beams is 1.5; it must be a valid integer"),
        ({"sample": True, "top_p": 1.5}, "top_p is 1.5; it must be less than or equal to 1"),
        ({"sample": True, "top_p": 0.0}, "top_p is 0.0; it must be greater than 0"),
        ({"sample": True, "top_k": 0}, "top_k is 0; it must be greater than 0"),
        ({"sample": True, "temperature": 0.0}, "temperature is 0.0; it must be greater than 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0; it must be greater than 0"),
        ({"length_penalty": 1e9, "beams": 2}, "length_penalty is 1000000000.0; it must be less than or equal to 100"),
        ({"early_stopping": "soon", "beams": 2}, "early_stopping is 'soon'; it must be False, True or 'never'"),
        ({"seed": -1}, "seed is -1; it must be greater than or equal to 0"),
        ({"top_p": 0.9}, "top_p is 0.9, which means something only with sample: true"),
        ({"temperature": 0.7}, "temperature is 0.7, which means something only with sample: true"),
        ({"length_penalty": 0.6}, "length_penalty is 0.6, which means something only with beams above 1"),
        ({"early_stopping": True}, "early_stopping is True, which means something only with beams above 1"),
        ({"sample": True, "beams": 4}, "sample is true and beams is 4, and a beam search draws nothing"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_clear_error(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model: Any = ours(make_t5(tmp_path / "t5"))
    with pytest.raises(UserError, match=message) as error:
        generate(model, None, ["text"], **{"max_new_tokens": 4, **settings})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_one_text_is_no_list_of_texts(tmp_path: Path) -> None:
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    assert generate(ours(make_t5(tmp_path / "none")), tokenizer, [], max_new_tokens=4) == []
    with pytest.raises(UserError, match=r"texts is the one text 'text'; it must be a list of texts, if need be of one"):
        generate(ours(make_t5(tmp_path / "one")), tokenizer, "text", max_new_tokens=4)

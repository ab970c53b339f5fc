"""Chats: conversations written down by the tokenizer's own template, of which the last answer alone is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import read
from stories import CHATML, make_stories
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from loralab.config.loading import load_recipe
from loralab.data.chat_template import QUESTION, open_chat, split_conversation, transcript
from loralab.data.inputs import read_texts
from loralab.data.lengths import resolve_lengths
from loralab.data.splits import Split
from loralab.data.tokenization import encode, encode_sources, encode_targets
from loralab.errors import DataError, ModelError, RecipeError
from loralab.inference.generate import GenerateRequest, run_request
from loralab.inference.saved_model import evaluate_saved
from loralab.on_torch.engine import open_engine
from loralab.on_torch.models.causal import join
from loralab.runs.record import read_lines
from loralab.training.train import train

SYSTEM = {"role": "system", "content": "You tell stories."}
TURNS = [
    {"role": "user", "content": "Who was at the park?"},
    {"role": "assistant", "content": "Tom {and} Lily."},
    {"role": "user", "content": "What did they see?\nSay it."},
    {"role": "assistant", "content": "They saw a big red ball."},
]


def chatty(folder: Path, architecture: str, data_folder: Path) -> Path:
    """A model's folder whose tokenizer has ChatML: the tokens of a turn's ends are added, the model has rows for them."""
    if architecture == "stories":
        model = AutoModelForCausalLM.from_pretrained(make_stories(folder, data_folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_positions=256, n_embd=32, n_layer=1, n_head=2))
        tokenizer = AutoTokenizer.from_pretrained(data_folder / "tokenizers/gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["stories", "gpt2"])
def base(request: pytest.FixtureRequest, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatty(tmp_path_factory.mktemp("chat") / "model", request.param, data_folder)


@pytest.fixture
def tokenizer(base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base)


def write_rows(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    return folder


def read_chats(place: Path) -> Split:
    return read(place, source=None, target=None, messages="messages")


def rendered(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, ask: bool) -> list[int]:
    """The tokens of a conversation by Transformers alone."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)


def test_the_unmasked_tokens_are_the_last_answer_and_its_end(tokenizer: Any, tmp_path: Path) -> None:
    rows = read_chats(write_rows(tmp_path, [[SYSTEM, *TURNS], TURNS[:2]]))
    encoded = encode(rows, tokenizer, open_chat(tokenizer), 400, 100)
    batch = encoded.collate(np.array([0, 1]), 0)
    ids, mask, following = join(*(torch.from_numpy(a) for a in (batch.source_ids, batch.source_mask, batch.labels)))
    learnt = [tokenizer.decode(row[row != -100]) for row in following]
    assert learnt == ["They saw a big red ball.<|im_end|>", "Tom {and} Lily.<|im_end|>"]
    assert not encoded.findings
    for row, messages in enumerate(([SYSTEM, *TURNS], TURNS[:2])):
        whole, asked = rendered(messages, tokenizer, ask=False), rendered(messages[:-1], tokenizer, ask=True)
        length = int(mask[row].sum())
        assert ids[row, :length].tolist() == whole[:length], "the very tokens of the whole conversation"
        assert tokenizer.decode(whole[length:]) == "\n", "all but the line end after the last turn"
        assert encoded.source(row).tolist() == asked


def test_long_conversations_lose_their_oldest_turns(tokenizer: Any) -> None:
    chat = open_chat(tokenizer)
    messages = [SYSTEM, *TURNS, TURNS[0]]
    source = json.dumps(messages)
    full = rendered(messages, tokenizer, ask=True)
    for kept in ([SYSTEM, *messages[3:]], [SYSTEM, messages[-1]]):
        shorter = rendered(kept, tokenizer, ask=True)
        assert encode_sources([source], tokenizer, chat, len(shorter)) == ([shorter], 1)
    assert encode_sources([source], tokenizer, chat, len(full)) == ([full], 0)
    least = rendered([SYSTEM, messages[-1]], tokenizer, ask=True)
    (ids,), cut = encode_sources([source], tokenizer, chat, len(least) - 2)
    assert cut == 1 and len(least) - 4 <= len(ids) <= len(least) - 2
    text = tokenizer.decode(ids)
    assert "Who was at" in text and "park?" not in text and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(DataError, match="leaves no room for a source"):
        encode_sources([source], tokenizer, chat, 12)


def test_long_answers_keep_the_end_of_their_turn(tokenizer: Any) -> None:
    (ids,), cut = encode_targets(["They saw a big red ball."], tokenizer, 5, open_chat(tokenizer))
    assert cut == 1 and len(ids) == 5 and tokenizer.decode(ids[-1]) == "<|im_end|>"
    assert "They saw a big red ball.".startswith(tokenizer.decode(ids[:-1]).strip())


def test_percentiles_are_of_whole_conversations(tokenizer: Any, tmp_path: Path) -> None:
    rows = read_chats(write_rows(tmp_path, [TURNS, TURNS[:2]]))
    chat = open_chat(tokenizer)
    longest = max(len(ids) for ids in encode_sources([row.source for row in rows.examples], tokenizer, chat, 999)[0])
    assert resolve_lengths(rows, tokenizer, "p100", 20, chat) == (longest, 20)


@pytest.mark.parametrize(
    ("after", "learnt"),
    [("</end>", "yes</end>"), ("\n", "yes<EOS>"), (" </end>\n\n", "yes</end>"), ("", "yes<EOS>")],
)
def test_a_turn_ends_where_its_template_says(after: str, learnt: str, data_folder: Path) -> None:
    """With an added token, or with the end of sequence where the template has none."""
    tokenizer: Any = AutoTokenizer.from_pretrained(data_folder / "tokenizers/gpt2")
    tokenizer.add_tokens(["</end>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}" + after + "{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (ids,), _ = encode_targets([" yes "], tokenizer, 9, open_chat(tokenizer))
    assert tokenizer.decode(ids) == learnt.replace("<EOS>", tokenizer.eos_token)


def test_a_text_is_a_users_message_and_json_is_a_conversation(tokenizer: Any) -> None:
    chat = open_chat(tokenizer)
    (asked, told), _ = encode_sources(["[1] Who?", json.dumps([SYSTEM, QUESTION])], tokenizer, chat, 100)
    assert asked == rendered([{"role": "user", "content": "[1] Who?"}], tokenizer, ask=True)
    assert told == rendered([SYSTEM, QUESTION], tokenizer, ask=True)
    assert transcript(json.dumps([SYSTEM, QUESTION])) == "You tell stories.\n?"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "line 1: column 'messages': [] is no conversation"),
        ("Hi", "'Hi' is no conversation"),
        (["Hi"], "message 1 is 'Hi', where {role, content} is needed"),
        ([{"from": "human", "value": "Hi"}], "message 1 is {'from'"),
        ([{"role": "usr", "content": "Hi"}, TURNS[1]], "message 1 has the role 'usr'. Did you mean 'user'?"),
        ([TURNS[0], {"role": "assistant", "content": " \n"}], "message 2, of the assistant, holds"),
        ([TURNS[0], {"role": "assistant", "content": None}], "message 2, of the assistant, holds None"),
        ([TURNS[0]], "the messages are of user. The last must be the assistant's"),
        ([SYSTEM, TURNS[1]], "the messages are of system, assistant."),
        ([TURNS[0], SYSTEM, TURNS[1]], "message 2 is the system's, which only the first can be"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_chats(write_rows(tmp_path, [row]))
    assert message in str(caught.value) and "train.jsonl, line 1" in str(caught.value)


def test_split_conversation() -> None:
    source, target = split_conversation([QUESTION, {"role": "assistant", "content": "é\r\n!"}], "here")
    assert json.loads(source) == [QUESTION] and target == "é\n!"


def test_a_tokenizer_without_a_template_says_so(data_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"this one has none.*Give data\.source and data\.target"):
        open_chat(AutoTokenizer.from_pretrained(data_folder / "tokenizers/gpt2"))


def test_a_template_that_refuses_or_answers_elsewhere(data_folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(data_folder / "tokenizers/gpt2")
    tokenizer.chat_template = "{{ 'asked' if add_generation_prompt else messages[-1].content }}"
    with pytest.raises(ModelError, match="asks for an answer with 'asked'"):
        open_chat(tokenizer)
    refusal = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + refusal + "{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"template refuses a conversation \(no system\): .*You tell stories"):
        encode_sources([json.dumps([SYSTEM, QUESTION])], tokenizer, open_chat(tokenizer), 9)


def test_what_is_wrong_with_a_message_is_counted_with_its_row(tmp_path: Path) -> None:
    rows = [
        [{"role": "user", "content": "a<br />b"}, {"role": "assistant", "content": "c\r\nd"}],
        None,
        TURNS[:2],
        TURNS[:2],
    ]
    chats = read(write_rows(tmp_path, rows), source=None, target=None, messages="messages", html_breaks="newline")
    assert chats.findings.keys() == {"crlf", "html_breaks", "missing", "repeated"}
    assert json.loads(chats.examples[0].source)[0]["content"] == "a\nb" and chats.examples[0].targets == ("c\nd",)
    assert [example.row for example in chats] == [1, 3, 4]


def test_a_file_of_chats_to_answer(tmp_path: Path) -> None:
    """An answer that is there already is what a model is asked for."""
    rows = [[SYSTEM, *TURNS], [SYSTEM, *TURNS[:3]], "Hi"]
    file = write_rows(tmp_path, rows) / "train.jsonl"
    asked = [json.dumps([SYSTEM, *TURNS[:3]])] * 2
    assert read_texts(str(file), "messages", chat=True).texts == [*asked, "Hi"]
    with pytest.raises(DataError, match="line 1: column 'messages': there is no message of the user's"):
        read_texts(str(write_rows(tmp_path, [[SYSTEM]]) / "train.jsonl"), "messages", chat=True)


# Through the commands


@pytest.fixture(scope="module")
def recipe(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chats")
    replies = {"What is the cat?": "Big.", "What is the dog?": "Red.", "What is the bird?": "Sad."}
    rows = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        for question, reply in replies.items()
    ]
    write_rows(place / "data", 2 * rows)
    settings = {
        "model": {"name": str(base), "dtype": "float32", "device": "cpu", "dropout": 0},
        "data": {"name": str(place / "data"), "messages": "messages", "max_source_length": 64, "max_target_length": 16},
        "training": {"method": "full", "batch_size": 6, "epochs": 150},
        "optimizer": {"learning_rate": 5e-3, "schedule": "constant"},
        "evaluation": {"split": "validation", "max_new_tokens": 12},
    }
    (place / "chat.yaml").write_text(json.dumps(settings))
    return place / "chat.yaml"


def test_a_chat_is_learnt_and_its_answers_stop(recipe: Path) -> None:
    """Also where the model's own end token is another: after the turn's end nothing more is written."""
    out, record = train(load_recipe(recipe), recipe.parent / "run")
    assert record["metrics"]["loss"]["value"] < 0.3
    rows = read_lines(out / "predictions.jsonl")
    assert [row["prediction"] for row in rows[:3]] == ["Big.", "Red.", "Sad."]
    assert rows[0]["source"] == "What is the cat?"
    assert run_request(out, GenerateRequest(texts=["What is the dog?"]), [], None, None)[0] == {"answers": ["Red."]}
    assert evaluate_saved(out, [], None)["metrics"]["rouge1"]["value"] == 100
    saved, tokenizer = AutoModelForCausalLM.from_pretrained(out / "model"), AutoTokenizer.from_pretrained(out / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the bird?"}], add_generation_prompt=True, return_tensors="pt"
    )
    written = saved.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(written[0, ids["input_ids"].shape[1] :]).strip() == "Sad.<|im_end|>", (
        "it stops for others too"
    )


def test_messages_stand_alone_in_a_recipe(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="data: messages and source, prompt are both given; messages stand alone"):
        load_recipe(recipe, ["data.source=text", "data.prompt=Say {text}"])
    with pytest.raises(RecipeError, match=r"data\.target: missing; name the column"):
        load_recipe(recipe, ["data.messages=null", "data.source=a", "data.target=null"])
    assert load_recipe(recipe).variant is not None


def test_an_encoder_decoder_has_no_chats_and_needs_a_source(workshop: Path) -> None:
    for settings, got in (
        (
            ["data.messages=m", "data.source=null", "data.target=null", 'data.prompt="{source}"'],
            r"data\.messages is for",
        ),
        (["data.source=null", 'data.prompt="{source}"'], r"data\.source is null, which is for"),
    ):
        with pytest.raises(RecipeError, match=got + ".* decoder-only models, and this one is an encoder-decoder"):
            open_engine(load_recipe(workshop / "tiny.yaml", settings))

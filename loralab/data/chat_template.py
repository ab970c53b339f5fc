"""Conversations: a list of messages in one column, written down by the tokenizer's own chat template.

    [{"role": "system", "content": ...}, {"role": "user", ...}, {"role": "assistant", ...}, {"role": "user", ...}, ...]

The last message is the assistant's and is learnt, with the token that ends its turn; all before it is the source. A
source is kept as JSON, so that it is a text like any other until tokens are made of it.

https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from loralab.data.prompts import Prompt
from loralab.errors import DataError, ModelError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
MARK = "\u2042"  # a word that no template has, to find where contents go
QUESTION: Message = {"role": "user", "content": "?"}  # the conversation in which an answer is tokenised


# Reading


def split_conversation(value: object, where: str) -> tuple[str, str]:
    """(all messages but the last as JSON, the text of the last), with LF line ends.

    Raises:
        DataError: it is no list of messages, a role is unknown or out of place, or a message is empty.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {value!r:.60} is no conversation. It is a list of {{role, content}}, oldest first.")
    messages = [_message(each, number, where) for number, each in enumerate(value, start=1)]
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise DataError(
            f"{where}: message {roles.index('system', 1) + 1} is the system's, which only the first can be."
        )
    if roles[-1] != "assistant" or "user" not in roles:
        raise DataError(
            f"{where}: the messages are of {', '.join(roles)}. The last must be the assistant's, "
            "which is learnt, and one before it the user's."
        )
    return json.dumps(messages[:-1], ensure_ascii=False), messages[-1]["content"]


def request_of(value: list[object], where: str) -> str:
    """The messages to answer, as JSON: all, but for an answer of the assistant's that is there already."""
    messages = [_message(each, number, where) for number, each in enumerate(value, start=1)]
    messages = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if "user" not in [message["role"] for message in messages]:
        raise DataError(f"{where}: there is no message of the user's to answer.")
    return json.dumps(messages, ensure_ascii=False)


def _message(value: object, number: int, where: str) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= set(value):
        raise DataError(f"{where}: message {number} is {value!r:.60}, where {{role, content}} is needed.")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise DataError(f"{where}: message {number} has the role {role!r:.30}. {nearest(str(role), ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where}: message {number}, of the {role}, holds {content!r:.60}, where text is needed.")
    return {"role": role, "content": content.replace("\r\n", "\n")}


def messages_of(source: str) -> list[Message]:
    """The messages of a source; any other text is a user's first message."""
    try:
        messages = json.loads(source)
    except ValueError:
        messages = None
    if isinstance(messages, list) and messages and all(isinstance(each, dict) for each in messages):
        return [_message(each, number, "The conversation") for number, each in enumerate(messages, start=1)]
    return [{"role": "user", "content": source}]


def transcript(source: str) -> str:
    """Returns what is said in a source, for people: the contents, one below the other."""
    return "\n".join(message["content"] for message in messages_of(source))


# Writing down


@dataclass(frozen=True, slots=True)
class Chat:
    """A tokenizer's chat template."""

    template: str
    after: str
    """Token that ends an answer."""
    end: int
    """The token that ends the assistant's turn, which a model learns to write and stops at."""

    def with_examples(self, examples: Sequence[tuple[str, str]], source: str) -> str:
        """A source with worked examples, (source, answer) each, as earlier turns; the system's message stays the source's own."""
        system, turns = parted(messages_of(source))
        earlier = [each for asked, answer in examples for each in (*parted(messages_of(asked))[1], answer_of(answer))]
        return json.dumps([*system, *earlier, *turns], ensure_ascii=False)


def open_chat(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """The tokenizer's template, tried on a short conversation.

    Raises:
        ModelError: there is none, or the assistant's turn does not begin where the template asks for one.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "data.messages needs a tokenizer with a chat template, and this one has none: the model was not made for chats. "
            "Give data.source and data.target instead, with what surrounds them in data.prompt."
        )
    asked, whole = rendered([QUESTION], tokenizer), rendered([QUESTION, answer_of(MARK)], tokenizer, ask=False)
    if not whole.startswith(asked) or whole.count(MARK) != 1:
        raise ModelError(
            f"The tokenizer's chat template asks for an answer with {asked!r} and writes one as {whole!r}, which does not go on "
            "from there. Give data.source and data.target instead."
        )
    after = whole.partition(MARK)[2]
    added = tokenizer.added_tokens_decoder
    closing = [token for token in bare_ids([after], tokenizer)[0] if token in added] or [tokenizer.eos_token_id]
    return Chat(str(tokenizer.get_chat_template()), after, closing[0])


def parted(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """(the system's message, if there is one; the turns)."""
    return (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)


def answer_of(text: str) -> Message:
    return {"role": "assistant", "content": text}


def rendered(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, ask: bool = True) -> str:
    """The conversation as text; `ask`: with what makes the model answer at its end."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    except TemplateError as error:
        raise DataError(
            f"The tokenizer's chat template refuses a conversation ({error}): {json.dumps(messages):.200}"
        ) from error
    assert isinstance(text, str)
    return text


def bare_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids without what the tokenizer would add: the template has written it."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return ids


def encode_conversation(source: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], bool]:
    """(token ids up to where the answer begins, whether something had to go).

    Of a conversation that is too long the oldest turns go, up to the next message of the user's; the system's message
    stays. Where the last message alone is too long, its end goes. Raises `DataError` where nothing of it would stay.
    """
    system, turns = parted(messages_of(source))
    begins = [place for place, message in enumerate(turns) if message["role"] == "user"]
    for begin in dict.fromkeys((0, *begins)):
        (ids,) = bare_ids([rendered([*system, *turns[begin:]], tokenizer)], tokenizer)
        if len(ids) <= max_length:
            return ids, begin > 0
    *others, last = turns[begins[-1] if begins else 0 :]
    prefix, suffix = rendered([*system, *others, last | {"content": MARK}], tokenizer).split(MARK)
    prompt = Prompt(f"{_literal(prefix)}{{source}}{_literal(suffix)}")
    return prompt.cut(last["content"], partial(tokenizer.__call__, add_special_tokens=False), max_length), True


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def encode_answers(answers: Sequence[str], tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[list[int]]:
    """The token ids of each answer as it stands in a conversation, without the turn's end.

    Tokens are those of the whole conversation after those of the request. Where a token would reach over the place at which
    they meet, a model that is asked never sees it, and the answer is tokenised by itself.
    """
    asked = rendered([QUESTION], tokenizer)
    (start,) = bare_ids([asked], tokenizer)
    texts = [rendered([QUESTION, answer_of(answer)], tokenizer, ask=False) for answer in answers]
    texts = [text[: len(text) - len(chat.after)] for text in texts]
    alone = bare_ids([text[len(asked) :] for text in texts], tokenizer)
    return [
        ids[len(start) :] if ids[: len(start)] == start else by_itself
        for ids, by_itself in zip(bare_ids(texts, tokenizer), alone, strict=True)
    ]

"""Chats: the model reads a conversation by its tokenizer's template and writes the last answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loralab.data.chat_template import Chat, open_chat, transcript
from loralab.data.prompts import Prompt
from loralab.metrics.labels import Labels
from loralab.tasks.language_modeling import check_causal
from loralab.tasks.text_answers import TextAnswerTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatTask(TextAnswerTask):
    """`data.messages`."""

    def prompt(self, tokenizer: PreTrainedTokenizerBase, causal: bool, labels: Labels | None = None) -> Prompt | Chat:
        check_causal(causal, "data.messages")
        return open_chat(tokenizer)

    def shown(self, source: str) -> str:
        return transcript(source)

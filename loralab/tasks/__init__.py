"""Tasks: one object for each kind of rows that a model learns from. It knows which columns a row has, how rows become token
ids and batches, how a model is scored on them, and what all this is called.

    seq2seq            a source, and a target that is written      T5; GPT-2 reads both as one sequence
    chat               a conversation, of which the last answer is learnt
    language_modeling  plain texts, packed side by side or one a row
    denoising          documents, parts of which are masked
    classification     a text, or a pair of texts, and its label
    regression         the same, and a number

The `data` block of a recipe selects the task (`task_of`). A new task is a module here, a line in TASKS, its name in
config/data.py and its columns in data/columns.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from loralab.config.data import DataSettings
from loralab.tasks.chat import ChatTask
from loralab.tasks.classification import ClassificationTask
from loralab.tasks.denoising import DenoisingTask
from loralab.tasks.language_modeling import LanguageModelingTask
from loralab.tasks.regression import RegressionTask
from loralab.tasks.seq2seq import Seq2SeqTask
from loralab.tasks.task import Task

TASKS: Mapping[str, type[Task]] = {
    "seq2seq": Seq2SeqTask,
    "chat": ChatTask,
    "language_modeling": LanguageModelingTask,
    "denoising": DenoisingTask,
    "classification": ClassificationTask,
    "regression": RegressionTask,
}


def task_of(data: DataSettings) -> Task:
    """Returns the task that these settings describe."""
    return TASKS[data.task](data)

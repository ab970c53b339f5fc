"""The base of a recipe: its folder, tokenizer, device and dtype, and what its rows look like. Reads its model, and reads it again."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from loralab.config.recipe import Recipe
from loralab.data.chat_template import Chat
from loralab.metrics.labels import Labels
from loralab.models.checkpoint_files import load_tokenizer, model_folder
from loralab.on_torch.loading.classifier import fitted_labels, load_classifier
from loralab.on_torch.loading.device import choose_device, choose_dtype
from loralab.on_torch.loading.load import load_weights
from loralab.on_torch.loading.supported_models import check_looks_back, check_supported
from loralab.on_torch.models.causal import CausalFamily
from loralab.on_torch.models.classifier import prepare_padding
from loralab.on_torch.models.registry import family_of
from loralab.on_torch.quantization.quantize import quantization
from loralab.tasks import task_of


class RecipeBase:
    """A base as a recipe wants it: one that generates text, or a classifier of the data's labels.

    Attributes:
        fresh: the parameters of a classifier's head that the files read last lack, which are random.
        positions: the most tokens of a row; None where there is no bound.
        causal: whether source and target are one sequence to it.
        labels: of a classifier, those that it chooses from.
    """

    def __init__(self, recipe: Recipe, name: str, labels: Labels | None) -> None:
        """Finds the base; nothing is read but its config and its tokenizer.

        Args:
            name: its folder or hub id.
            labels: of the data, for a classifier; without them it has those of its head.

        Raises:
            ModelError: there is no such base, or it is none that this recipe can train.
        """
        self.recipe, self.folder, self.task = recipe, model_folder(name), task_of(recipe.data)
        check_supported(self.folder, self.task.classifies)
        self.device = choose_device(recipe.model.device)
        self.dtype, self.dtype_reason = choose_dtype(recipe.model.dtype, self.device)
        self.tokenizer = load_tokenizer(self.folder)
        self.causal, self.fresh = False, list[str]()
        self.positions: int | None = None
        self.labels: Labels | None = None
        if self.task.classifies:
            fitted, self._keeps_head = fitted_labels(labels, self.folder)
            self.labels = fitted.also(recipe.data.labels)

    def open(self) -> nn.Module:
        """Reads the model for the first time, and learns from it what its rows look like.

        Raises:
            ModelError: the files are damaged or do not belong together, or the model sees later tokens.
        """
        model = self.read(self.folder)
        family = family_of(model)
        family.check_vocabulary(model, self.tokenizer, self.folder)
        if family.classifies:
            prepare_padding(model, self.tokenizer)
        self.causal, self.positions = family.causal, family.positions(model, self.tokenizer)
        self.prompt = self.task.prompt(self.tokenizer, self.causal, self.labels)
        if isinstance(family, CausalFamily):
            check_looks_back(model)
            if (longest := self.task.packed_length) is not None:
                family.check_packing(model, min(longest, self.positions or longest))
        self.set_special_tokens(model)
        return model

    def read(self, folder: Path) -> nn.Module:
        """Reads a model of this base's kind: the base itself, or one that was trained from it."""
        settings = self.recipe.model
        how = quantization(settings.quantize, settings.quantize_except)
        if self.labels is None:
            model = load_weights(folder, self.dtype, self.device, how)
        else:
            keep, seed = self._keeps_head or folder != self.folder, self.recipe.training.one_seed
            model, self.fresh = load_classifier(folder, self.labels, keep, self.dtype, self.device, seed, how)
        model.name_or_path = settings.name  # type: ignore[assignment]
        return model

    def set_special_tokens(self, model: nn.Module) -> None:
        """Tells a model which token ends an answer, and a classifier which one is padding."""
        end = self.prompt.end if isinstance(self.prompt, Chat) else self.tokenizer.eos_token_id
        family_of(model).set_special_tokens(model, self.tokenizer, end)

    @property
    def dtype_name(self) -> str:
        """The dtype as recipes spell it: float32, bfloat16."""
        return str(self.dtype).removeprefix("torch.")

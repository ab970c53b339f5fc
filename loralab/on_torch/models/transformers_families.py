"""Families of Transformers' own classes: encoder-decoders, decoders, and sequence classifiers of any architecture.

What differs between architectures is Transformers' to know; what it does not say of its classes is tried (does the head come last,
are texts of a row apart).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loralab.config.generation import Decoding
from loralab.data.stop_sequences import Stops
from loralab.errors import ModelError, nearest
from loralab.models.lookup import Base
from loralab.models.pretrained import from_config, from_pretrained, refuse_code
from loralab.on_torch.generation.transformers_generate import transformers_decode
from loralab.on_torch.loading.weights import quiet_transformers
from loralab.on_torch.models import classifier
from loralab.on_torch.models.causal import CausalFamily, head_is_last, losses_at
from loralab.on_torch.models.family import ModelFamily, modules_called
from loralab.on_torch.models.heads import has_label_head
from loralab.on_torch.models.output import IGNORED
from loralab.on_torch.ops.onednn_linear import by_onednn
from loralab.on_torch.ops.random_streams import checkpoint_settings
from loralab.on_torch.training import sequence_packing
from loralab.on_torch.training.loss import log_probabilities, smoothed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TransformersFamily(ModelFamily):
    """Behaviour shared by the classes of Transformers.

    Attributes:
        auto_class: Transformers' class that builds any of this family from a config.
        kind: what it is called in messages.
    """

    auto_class: str
    kind: str

    def owns(self, model: nn.Module) -> bool:
        return _is_transformers(model) and self._is_of_this_kind(model)

    @abstractmethod
    def _is_of_this_kind(self, model: nn.Module) -> bool:
        """Says if a model of Transformers' is of this family."""

    def build(self, base: Base, dtype: torch.dtype, device: torch.device) -> nn.Module:
        import transformers

        config = _config(base)
        if base.labels is not None:
            config.num_labels, config.problem_type = base.labels, classifier.SINGLE
        try:
            with device, quiet_transformers(warnings=False):
                model: nn.Module = from_config(getattr(transformers, self.auto_class), config)
        except ValueError as error:
            raise ModelError(
                f"{base.origin} is of the architecture {base.family!r}, of which Transformers has no {self.kind} to train with this recipe."
            ) from error
        return by_onednn(model.to(device, dtype))

    def load(self, folder: Path, config: dict[str, Any], dtype: torch.dtype | None, device: torch.device) -> nn.Module:
        import transformers

        refuse_code(folder)
        names = config.get("architectures") or []
        known = [getattr(transformers, str(name), None) for name in names]
        classes = [kind for kind in known if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]
        if not classes:
            raise ModelError(
                f"{folder}/config.json names the architectures {names}; Transformers {transformers.__version__} has none of them."
            )
        model: nn.Module
        with quiet_transformers():
            model, found = from_pretrained(classes[0], folder, dtype=dtype or "auto", output_loading_info=True)
        if missing := sorted(found["missing_keys"]):
            raise ModelError(
                f"{folder} lacks {len(missing)} of the weights that a {classes[0].__name__} has, such as {missing[0]}; "
                "they would be random. Is its config.json that of another class?"
            )
        return by_onednn(model.to(device).eval())

    def save(self, model: nn.Module, folder: Path, source: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(folder)  # type: ignore[operator]

    def checkpoint_activations(self, model: nn.Module) -> None:
        newer = getattr(model, "activation_checkpointing_enable", None)  # its name since Transformers 5.23
        (newer or model.gradient_checkpointing_enable)(checkpoint_settings())  # type: ignore[operator]

    def sharding_units(self, model: nn.Module) -> list[str]:
        """Returns the modules that Transformers does not split over devices, but those that share a parameter with others; where a class
        names none, its longest lists of layers."""
        if named := getattr(model, "_no_split_modules", None):
            everywhere = _uses(model)
            units = modules_called(model, tuple(named))
            return [unit for unit in units if _uses(model.get_submodule(unit)).items() <= everywhere.items()]
        stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        longest = max((len(stack) for _, stack in stacks), default=0)
        return [f"{name}.{place}" for name, stack in stacks if len(stack) == longest for place in range(longest)]

    def write(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoding: Decoding,
        rows: Sequence[int],
        on_token: Callable[[int], None] | None = None,
        stops: Stops | None = None,
    ) -> list[list[int]]:
        begun = input_ids.shape[1] if self.causal else 1
        return transformers_decode(model, input_ids, attention_mask, decoding, rows, begun, on_token, stops)

    def trace_answer(self, model: nn.Module, ids: Tensor, mask: Tensor, new: int, beams: int) -> None:
        """Reads source and answer in one pass that keeps keys and values, with logits of the last token."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        hook = head.register_forward_pre_hook(lambda _, given: (given[0][:, -1:],))
        target = torch.empty(len(ids) * beams, new, dtype=torch.long, device="meta")
        source, seen = (each.expand(beams, *each.shape).flatten(0, 1) for each in (ids, mask))
        try:
            if self.causal:
                both = (torch.cat([source, target], 1), torch.cat([seen, target], 1))
                model(input_ids=both[0], attention_mask=both[1], use_cache=True)
            else:
                model(input_ids=source, attention_mask=seen, decoder_input_ids=target, use_cache=True)
        finally:
            hook.remove()


class TransformersSeq2Seq(TransformersFamily):
    """Encoder-decoders, such as BART and mT5."""

    auto_class, kind = "AutoModelForSeq2SeqLM", "encoder-decoder"
    logits_in_chunks = False

    def takes(self, config: Mapping[str, Any], classifies: bool) -> bool:
        return not classifies and _is_encoder_decoder(config)

    def _is_of_this_kind(self, model: nn.Module) -> bool:
        return bool(model.config.is_encoder_decoder) and not has_label_head(model)  # type: ignore[union-attr]

    def inputs(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        labels: Tensor,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> dict[str, Any]:
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def token_losses(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        labels: Tensor,
        smoothing: float = 0.0,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        logits_BTV = model(**self.inputs(model, ids, mask, labels)).logits
        real_BT = labels != IGNORED
        return smoothed(log_probabilities(logits_BTV[real_BT]), labels[real_BT], smoothing)

    def peft_task(self, model: nn.Module) -> str | None:
        return "SEQ_2_SEQ_LM" if hasattr(model, "prepare_inputs_for_generation") else None  # PEFT asks for the method


class TransformersCausal(CausalFamily, TransformersFamily):
    """Decoders, such as Llama and Qwen; and classes without a head that writes, for which there is LoRA and no recipe."""

    auto_class, kind = "AutoModelForCausalLM", "decoder"

    def takes(self, config: Mapping[str, Any], classifies: bool) -> bool:
        return not classifies and not _is_encoder_decoder(config)

    def _is_of_this_kind(self, model: nn.Module) -> bool:
        return not model.config.is_encoder_decoder and not has_label_head(model)  # type: ignore[union-attr]

    def set_special_tokens(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, end: int | None) -> None:
        config: Any = model.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if end not in ends:
            config.eos_token_id = [*(each for each in ends if each is not None), end]

    def joined_inputs(
        self, model: nn.Module, ids: Tensor, mask: Tensor | None, documents: Tensor | None = None
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if mask is not None:
            inputs["attention_mask"] = mask
        if documents is not None:
            inputs["position_ids"] = sequence_packing.positions_of(documents)
        return inputs

    def joined_losses(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor | None,
        following: Tensor,
        smoothing: float = 0.0,
        documents: Tensor | None = None,
    ) -> Tensor:
        return losses_at(model, following, smoothing, **self.joined_inputs(model, ids, mask, documents))

    def check_packing(self, model: nn.Module, length: int) -> None:
        def inputs_of(ids: Tensor, documents: Tensor | None) -> dict[str, Any]:
            return self.joined_inputs(model, ids, None, documents)

        sequence_packing.check_texts_apart(model, inputs_of, length)

    def peft_task(self, model: nn.Module) -> str | None:
        return "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None

    def run_once_before_training(self, model: nn.Module) -> None:
        head_is_last(model)


class TransformersClassifier(TransformersFamily):
    """Sequence classifiers of any architecture; loading/classifier.py gives them the labels of the data."""

    auto_class, kind = "AutoModelForSequenceClassification", "classifier"
    classifies = True

    def takes(self, config: Mapping[str, Any], classifies: bool) -> bool:
        return classifies

    def _is_of_this_kind(self, model: nn.Module) -> bool:
        return has_label_head(model)

    def positions(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
        return classifier.positions(model, tokenizer)

    def set_special_tokens(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, end: int | None) -> None:
        classifier.prepare_padding(model, tokenizer)

    def inputs(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        labels: Tensor,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> dict[str, Any]:
        types = (
            {} if token_types is None or not classifier.takes_token_types(model) else {"token_type_ids": token_types}
        )
        return {"input_ids": ids, "attention_mask": mask, **types}

    def token_losses(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        labels: Tensor,
        smoothing: float = 0.0,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        kind = str(model.config.problem_type or classifier.SINGLE)  # type: ignore[union-attr]
        logits_BC = model(**self.inputs(model, ids, mask, labels, token_types=token_types)).logits.float()
        return classifier.label_losses(logits_BC, labels, kind, smoothing)

    def peft_task(self, model: nn.Module) -> str | None:
        return "SEQ_CLS"

    def write(self, model: nn.Module, *_: Any, **__: Any) -> list[list[int]]:
        raise ModelError(f"{type(model).__name__} chooses among labels and writes no text. Take a base that writes.")

    def trace_answer(self, model: nn.Module, ids: Tensor, mask: Tensor, new: int, beams: int) -> None:
        """Computes the logits of the batch."""
        model(input_ids=ids, attention_mask=mask).logits.float()


def _is_transformers(model: nn.Module) -> bool:
    """Tells a class of Transformers' without importing that library."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


def _uses(model: nn.Module) -> Counter[int]:
    """Counts how many modules hold each parameter."""
    return Counter(id(each) for module in model.modules() for each in module.parameters(recurse=False))


def _is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """As config.json says, or else its architecture's class."""
    if "is_encoder_decoder" in config:
        return bool(config["is_encoder_decoder"])
    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    return kind in CONFIG_MAPPING and bool(getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False))


def _config(base: Base) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto import configuration_auto

    known: Mapping[str, str] = configuration_auto.CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
    if base.family not in known:
        raise ModelError(
            f"{base.origin}: Transformers knows no architecture {base.family!r}. {nearest(base.family, known)}"
        )
    settings = {key: value for key, value in base.config.items() if key not in ("model_type", "architectures")}
    return AutoConfig.for_model(base.family, **settings)

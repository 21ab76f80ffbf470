"""Load a Hugging Face classifier of any kind, by path or hub name: safetensors only, and never remote code.

Which kind: a prompt template makes it `few-shot`; label tokens in the checkpoint's config, `label-token`; else it is
`sequence-classification`.
"""

import logging
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from range_store.domain.range_set import ModelIdentity, ModelKind
from workers.models.checkpoint import config_entries, fingerprints, read_checkpoint, weight_files
from workers.models.errors import CheckpointError
from workers.models.facts import ModelFacts
from workers.models.families import Family, family_of
from workers.models.few_shot.build import few_shot_classifier
from workers.models.few_shot.model import Scoring
from workers.models.few_shot.prompt_templates import load_template
from workers.models.label_token import LabelTokenClassifier, LabelTokens
from workers.models.predictions import Head
from workers.models.prepack import prepack
from workers.models.steerable import SteerableModel
from workers.models.steered import SteeredModel
from workers.models.tokens import TextTokenizer

logger = logging.getLogger(__name__)

DType = Literal["auto", "float32", "bfloat16", "float16"]

_CHECK_TEXTS = ("A short one.", "A rather longer text, so that the first one is padded.")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A classifier ready to be steered.

    Attributes:
        dtype: name of its parameters' type, e.g. "float32".
        template: prompt template of a few-shot classifier, with its version, e.g. "ag_news@1".
        earlier_fingerprint, empty_logits: see `ModelFacts`.
    """

    identity: ModelIdentity
    problem_type: str | None
    steered: SteerableModel
    tokens: TextTokenizer
    dtype: str
    device: torch.device
    source: str
    template: str | None = None
    earlier_fingerprint: str | None = None
    empty_logits: tuple[tuple[float, ...], ...] = ()

    @property
    def facts(self) -> ModelFacts:
        """The description of the model that needs no torch."""
        return ModelFacts(
            identity=self.identity,
            problem_type=self.problem_type,
            dtype=self.dtype,
            device=str(self.device),
            source=self.source,
            max_tokens=self.tokens.max_tokens,
            splits=self.steered.splits,
            template=self.template,
            prefix_tokens=len(self.steered.prefix),
            truncation_side=self.tokens.truncation_side,
            earlier_fingerprint=self.earlier_fingerprint,
            empty_logits=self.empty_logits,
        )

    @property
    def head(self) -> Head:
        """How its logits are read."""
        return self.steered.head or self.facts.activation


def use_threads(threads: int | None) -> None:
    """Set the number of threads that torch uses on the CPU; None: torch's default."""
    if threads is not None:
        torch.set_num_threads(threads)


def load_model(
    source: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: DType = "auto",
    allow_pickle: bool = False,
    name: str | None = None,
    template: str | None = None,
    scoring: Scoring = "restricted",
    plain: bool = False,
    compiled: bool = False,
) -> LoadedModel:
    """Load a checkpoint and check that it can be split.

    Args:
        source: directory of a checkpoint, or its name on the hub.
        device: "auto" takes a GPU where there is one.
        dtype: "auto" is float32 on the CPU and the checkpoint's own type elsewhere.
        allow_pickle: accept weights that are pickled (`pytorch_model.bin`), which can run code when they load.
        name: of the model; by default the last part of `source`.
        template: prompt template of a few-shot classifier, by name or file: makes a pretrained language model one.
        scoring: of a few-shot classifier; see `FewShotModel`.
        plain: leave the model as transformers runs it, bit for bit: padded batches and, on a CPU, torch's own linear
            layers.
        compiled: compile the blocks with `torch.compile`; takes half a minute or more.

    Raises:
        CheckpointError: no such checkpoint or device, pickled weights, no trained classification head, or choices that
            exclude each other.
        UnsupportedModel: a family that `families.py` does not describe.
    """
    if compiled and (plain or template is not None):
        other = "--plain" if plain else "--template"
        raise CheckpointError(f"--compile cannot be combined with {other}: leave one of them out")
    if source.startswith(("/", ".", "~")) and not Path(source).expanduser().is_dir():
        raise CheckpointError(f"no such directory: {source}")  # else the hub would be asked for it
    source = str(Path(source).expanduser()) if source.startswith("~") else source
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what matters is checked below
    place = _device(device)
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    config = read_checkpoint(source, lambda: AutoConfig.from_pretrained(source, **hub))
    family = family_of(config.model_type)
    torch_dtype = _dtype(dtype, place, config)
    files = weight_files(source, revision, allow_pickle)
    tokenizer = read_checkpoint(source, lambda: AutoTokenizer.from_pretrained(source, **hub))
    with_defaults: dict[str, Any] = config.to_dict()
    extra: dict[str, Any] = {}
    pad = _pad_id(tokenizer, config, family, source)
    n_embeddings = _embeddings(tokenizer, config, source)
    label_tokens = LabelTokens.of(config, source)
    prompt = None if template is None else load_template(template)
    causal = label_tokens is not None or prompt is not None
    if causal and not family.causal:
        raise CheckpointError(f"{source} is a {config.model_type}, which is not a causal language model")
    model = _trained_model(source, causal, config=config, dtype=torch_dtype, allow_pickle=allow_pickle, **hub)
    model = model.to(place).eval().requires_grad_(False)
    if place.type == "cpu" and not plain and not compiled:
        prepack(model.get_submodule(family.blocks), torch_dtype)
    max_tokens = _max_tokens(tokenizer, config, family, pad)
    steered: SteerableModel
    kind: ModelKind
    labels: tuple[str, ...]
    if prompt is not None:
        kind, labels = "few-shot", tuple(label.label for label in prompt.labels)
        steered, tokens = few_shot_classifier(model, tokenizer, family, prompt, scoring, max_tokens, pad, n_embeddings)
        extra = {"few_shot": {"template": prompt.model_dump(mode="json"), "scoring": scoring}}
    elif label_tokens is not None:
        kind, labels = "label-token", label_tokens.labels
        steered = SteeredModel(LabelTokenClassifier(model, label_tokens.ids).eval(), family, plain=plain)
        tokens = TextTokenizer(tokenizer, max_tokens, pad, "last", (label_tokens.sep,), n_embeddings=n_embeddings)
    else:
        kind, labels = "sequence-classification", _labels(config, source)
        steered = SteeredModel(model, family, plain=plain)
        typed = _has_types(tokenizer, config)
        tokens = TextTokenizer(tokenizer, max_tokens, pad, family.reads, typed=typed, n_embeddings=n_embeddings)
    check = tokens.batch(tokens.encode(_CHECK_TEXTS), place)
    steered.check(check)
    if not steered.splits:
        logger.warning("%s cannot be split at its blocks: erasures cost a full forward pass each", source)
    if compiled and not steered.compile_blocks(check) and place.type == "cpu":
        prepack(model.get_submodule(family.blocks), torch_dtype)
    fingerprint, earlier = fingerprints(config_entries(source, revision), with_defaults, extra, files)
    identity = ModelIdentity(
        id=name or Path(source).name,
        revision=revision or getattr(config, "_commit_hash", None),
        kind=kind,
        family=config.model_type,
        fingerprint=fingerprint,
        labels=labels,
        n_layers=steered.n_layers,
        hidden_size=config.hidden_size,
    )
    return LoadedModel(
        identity=identity,
        problem_type=config.problem_type if kind == "sequence-classification" else None,
        steered=steered,
        tokens=tokens,
        dtype=str(torch_dtype).removeprefix("torch."),
        device=place,
        source=source,
        template=None if prompt is None else prompt.id,
        earlier_fingerprint=earlier,
        empty_logits=steered.empty_logits(check),
    )


def _trained_model(source: str, causal: bool, *, allow_pickle: bool, **options: Any) -> Any:
    """A causal language model or a sequence classifier of transformers, of which no weight is missing."""
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    safe = None if allow_pickle else True
    model, info = read_checkpoint(
        source, lambda: auto.from_pretrained(source, use_safetensors=safe, output_loading_info=True, **options)
    )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{source} is not a trained {'language model' if causal else 'sequence classifier'} "
            f"(it lacks {', '.join(missing[:3])}): "
            "fine-tune it first with `neuronlens train`, or pass --template to prompt a language model"
        )
    return model


def _device(name: str) -> torch.device:
    """The device, tried out: torch may know the name of hardware that this machine lacks."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CheckpointError(f"no device {name!r} here ({str(error).splitlines()[0]}): use auto or cpu") from error
    return device


def _dtype(dtype: DType, device: torch.device, config: Any) -> torch.dtype:
    if dtype == "auto":
        own = getattr(config, "dtype", None)
        return own if device.type != "cpu" and isinstance(own, torch.dtype) else torch.float32
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


def _max_tokens(tokenizer: Any, config: Any, family: Family, pad: int) -> int:
    """Most tokens of a text: the model's positions, or fewer if the tokenizer says so."""
    positions = config.max_position_embeddings - (pad + 1 if family.positions_after_pad else 0)
    return int(min(positions, tokenizer.model_max_length))


def _has_types(tokenizer: Any, config: Any) -> bool:
    """Whether a pair has token type ids, as transformers decides: its tokenizer gives them, and the model has two."""
    return getattr(config, "type_vocab_size", 0) > 1 and "token_type_ids" in tokenizer.model_input_names


def _pad_id(tokenizer: Any, config: Any, family: Family, source: str) -> int:
    """The id that texts are padded with: the config's, which is set where it is missing or not one of its tokens."""
    own, tokens = config.pad_token_id, config.vocab_size
    if own is not None and 0 <= own < tokens:
        return int(own)
    problem = f"pad_token_id {own} of {source} is not one of its {tokens} tokens"
    if own is not None and family.positions_after_pad:
        raise CheckpointError(f"{problem}, and positions are counted from it: correct its config.json")
    others = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((int(each) for each in others if each is not None and 0 <= each < tokens), None)
    if pad is None:
        raise CheckpointError(f"{source} has neither a pad token nor an eos token: texts cannot be batched")
    if own is not None:
        logger.warning("%s: texts are padded with token %d instead", problem, pad)
    config.pad_token_id = pad
    return pad


def _embeddings(tokenizer: Any, config: Any, source: str) -> int | None:
    """The number of the model's token embeddings, if the tokenizer has tokens beyond them."""
    embeddings: int = config.vocab_size
    others = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= embeddings)
    if not others:
        return None
    logger.warning(
        "the tokenizer of %s has tokens that the model has no embedding for (%d: %s): texts with one are refused",
        source,
        len(others),
        ", ".join(repr(token) for _, token in others[:3]) + (", …" if len(others) > 3 else ""),
    )
    return embeddings


def _labels(config: Any, source: str) -> tuple[str, ...]:
    """The labels in the order of the head's outputs."""
    numbers = sorted(config.id2label)
    if numbers == list(range(1, len(numbers) + 1)):
        logger.warning("id2label of %s counts from 1: its labels are taken in that order", source)
    elif numbers != list(range(len(numbers))):
        raise CheckpointError(
            f"id2label of {source} must number its labels 0 to {len(numbers) - 1}, and has {numbers}: "
            "correct its config.json"
        )
    labels = tuple(str(config.id2label[number]) for number in numbers)
    forms = [unicodedata.normalize("NFC", label) for label in labels]
    for index, form in enumerate(forms):
        if (first := forms.index(form)) < index:
            how = "are the same" if labels[first] == labels[index] else "differ in their Unicode form only"
            logger.warning("labels %d and %d of %s %s: %r", first, index, source, how, form)
    return labels

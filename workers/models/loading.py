"""Load a Hugging Face classifier of any kind, by path or hub name: safetensors only, and never remote code.

Which kind: a prompt template makes it `few-shot`; label tokens in the checkpoint's config, `label-token`; else it is
`sequence-classification`.
"""

import json
import logging
import unicodedata
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.hub import cached_file

from range_store.domain.range_set import ModelIdentity, ModelKind
from workers.models.errors import CheckpointError
from workers.models.facts import ModelFacts
from workers.models.families import Family, family_of
from workers.models.few_shot import FewShotModel, Scoring
from workers.models.fingerprints import fingerprints
from workers.models.label_token import LabelTokenClassifier, LabelTokens
from workers.models.predictions import Head
from workers.models.prepack import prepack
from workers.models.prompts import PromptTemplate, load_template
from workers.models.steered import SteeredModel
from workers.models.tokens import TextTokenizer

logger = logging.getLogger(__name__)

DType = Literal["auto", "float32", "bfloat16", "float16"]

Steerable = SteeredModel | FewShotModel

_CHECK_TEXTS = ("A short one.", "A rather longer text, so that the first one is padded.")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A classifier ready to be steered. `dtype` is the name of its parameters' type, e.g. "float32".

    `template`: prompt template of a few-shot classifier, with its version, e.g. "ag_news@1". `empty_logits`: see
    `ModelFacts`. `earlier_fingerprint`: what earlier versions had for the fingerprint of `identity`.
    """

    identity: ModelIdentity
    problem_type: str | None
    steered: Steerable
    tokens: TextTokenizer
    dtype: str
    device: torch.device
    source: str
    template: str | None = None
    earlier_fingerprint: str | None = None
    empty_logits: tuple[tuple[float, ...], ...] = ()

    @property
    def facts(self) -> ModelFacts:
        """What others need to know of it."""
        return ModelFacts(
            self.identity,
            self.problem_type,
            self.dtype,
            str(self.device),
            self.source,
            self.tokens.max_tokens,
            self.steered.splits,
            self.template,
            len(self.steered.prefix) if isinstance(self.steered, FewShotModel) else 0,
            self.tokens.truncation_side,
            self.earlier_fingerprint,
            self.empty_logits,
        )

    @property
    def head(self) -> Head:
        """How its logits are read."""
        if isinstance(self.steered, FewShotModel) and self.steered.scoring == "greedy":
            return "greedy"
        return self.facts.activation


def use_threads(threads: int | None) -> None:
    """Let torch use so many threads on the CPU; None: as many as it takes by itself."""
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
        name: what to call the model; by default the last part of `source`.
        template: prompt template of a few-shot classifier, by name or file: makes a pretrained language model one.
        scoring: of a few-shot classifier; see `workers.models.few_shot`.
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
        raise CheckpointError(f"--compile does not go with {other}: leave one of them out")
    if source.startswith(("/", ".", "~")) and not Path(source).expanduser().is_dir():
        raise CheckpointError(f"no such directory: {source}")  # else the hub would be asked for it
    source = str(Path(source).expanduser()) if source.startswith("~") else source
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what matters is checked below
    place = _place(device)
    config = _read(source, lambda: AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False))
    family = family_of(config.model_type)
    torch_dtype = _dtype(dtype, place, config)
    files = _weight_files(source, revision, allow_pickle)
    tokenizer = _read(source, lambda: AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False))
    whole, more = config.to_dict(), {}
    pad = _pad_id(tokenizer, config, family, source)
    known = _known_tokens(tokenizer, config, source)
    label_tokens = LabelTokens.of(config, source)
    prompt = None if template is None else load_template(template)
    auto = AutoModelForSequenceClassification if label_tokens is None and prompt is None else AutoModelForCausalLM
    if auto is AutoModelForCausalLM and not family.causal:
        raise CheckpointError(f"{source} is a {config.model_type}, which is no causal language model")
    model, info = _read(
        source,
        lambda: auto.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=torch_dtype,
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=False,
            output_loading_info=True,
        ),
    )
    if missing := sorted(info["missing_keys"]):
        what = "sequence classifier" if auto is AutoModelForSequenceClassification else "language model"
        raise CheckpointError(
            f"{source} is no trained {what} (it lacks {', '.join(missing[:3])}): "
            "fine-tune it first with `neuronlens train`, or pass --template to prompt a language model"
        )
    model = model.to(place).eval().requires_grad_(False)
    if place.type == "cpu" and not plain and not compiled:
        prepack(model.get_submodule(family.blocks), torch_dtype)
    most = _max_tokens(tokenizer, config, family, pad)
    steered: Steerable
    kind: ModelKind
    labels: tuple[str, ...]
    if prompt is not None:
        kind, labels = "few-shot", tuple(label.label for label in prompt.labels)
        steered, tokens = few_shot(model, tokenizer, family, prompt, scoring, most, pad, known)
        more = {"few_shot": {"template": prompt.model_dump(mode="json"), "scoring": scoring}}
    elif label_tokens is not None:
        kind, labels = "label-token", label_tokens.labels
        steered = SteeredModel(LabelTokenClassifier(model, label_tokens.ids).eval(), family, plain=plain)
        tokens = TextTokenizer(tokenizer, most, pad, "last", (label_tokens.sep,), known=known)
    else:
        kind, labels = "sequence-classification", _labels(config, source)
        steered = SteeredModel(model, family, plain=plain)
        tokens = TextTokenizer(tokenizer, most, pad, family.reads, typed=_has_types(tokenizer, config), known=known)
    check = tokens.pad([text.ids for text in tokens.encode(_CHECK_TEXTS)], place)
    steered.check(check)
    if not steered.splits:
        logger.warning("%s cannot be split at its blocks: erasures cost a full forward pass each", source)
    if compiled and isinstance(steered, SteeredModel) and not steered.compile_blocks(check) and place.type == "cpu":
        prepack(model.get_submodule(family.blocks), torch_dtype)
    fingerprint, earlier = fingerprints(_said(source, revision), whole, more, files)
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
    problem_type = config.problem_type if kind == "sequence-classification" else None
    dtype_name = str(torch_dtype).removeprefix("torch.")
    template_id = None if prompt is None else prompt.id
    # a few-shot classifier says what it says of a text behind a long prompt, which is not worth running for this
    empty = () if isinstance(steered, FewShotModel) else tuple(map(tuple, steered.empty_logits(check).float().tolist()))
    return LoadedModel(identity, problem_type, steered, tokens, dtype_name, place, source, template_id, earlier, empty)


def few_shot(
    model: Any,
    tokenizer: Any,
    family: Family,
    prompt: PromptTemplate,
    scoring: Scoring,
    most: int,
    pad: int,
    known: int | None = None,
) -> tuple[FewShotModel, TextTokenizer]:
    """A pretrained LM as a few-shot classifier, and the tokenizer of its texts; `most` tokens fit the model.

    Raises:
        CheckpointError: prompt and labels leave no room for a text, or hold a token that the model does not know.
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    prefix, suffix = bos + ids(prompt.prefix()), ids(prompt.suffix())
    strings = tuple(ids(label.text) for label in prompt.labels)
    if known is not None and max(chain(prefix, suffix, *strings)) >= known:
        raise CheckpointError(
            f"the prompt {prompt.name!r} holds a token that the model has no embedding for: use another template"
        )
    room = most - len(prefix) - max(map(len, strings)) - (FewShotModel.GREEDY_TOKENS if scoring == "greedy" else 0)
    if room <= len(suffix):
        raise CheckpointError(
            f"the prompt {prompt.name!r} has {len(prefix) + len(suffix)} tokens, the model takes {most}: "
            "use a template with fewer exemplars"
        )
    steered = FewShotModel(
        model,
        family,
        prefix,
        strings,
        scoring=scoring,
        decode=lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
        label_texts=tuple(label.text for label in prompt.labels),
    )
    return steered, TextTokenizer(tokenizer, room, pad, "last", suffix, known=known)


def _read(source: str, load: Any) -> Any:
    """Whatever `load` returns; its many kinds of failure as one clear CheckpointError."""
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"cannot load {source!r}: {reason}") from error


def _place(device: str) -> torch.device:
    """The device, tried out: a name that torch knows may still be of hardware that is not here."""
    try:
        place = torch.device(_auto_device() if device == "auto" else device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CheckpointError(f"no device {device!r} here ({str(error).splitlines()[0]}): use auto or cpu") from error
    return place


def _auto_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(dtype: DType, place: torch.device, config: Any) -> torch.dtype:
    if dtype == "auto":
        own = getattr(config, "dtype", None)
        return own if place.type != "cpu" and isinstance(own, torch.dtype) else torch.float32
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


def _config_file(source: str, revision: str | None) -> Path:
    return Path(_read(source, lambda: cached_file(source, "config.json", revision=revision)))


def _said(source: str, revision: str | None) -> dict[str, Any]:
    """What the checkpoint's config file says, without the defaults of the library."""
    said: dict[str, Any] = json.loads(_config_file(source, revision).read_bytes())
    return said


def _weight_files(source: str, revision: str | None, allow_pickle: bool) -> list[Path]:
    """The checkpoint's weight files, by name."""
    directory = _config_file(source, revision).parent

    def fetch(name: str) -> str | None:
        found: str | None = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return found

    kinds = [("model.safetensors", "*.safetensors")]
    if allow_pickle:
        kinds.append(("pytorch_model.bin", "pytorch_model*.bin"))
    for single, pattern in kinds:
        if fetch(single) is not None:
            return [directory / single]
        if index := fetch(f"{single}.index.json"):
            shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
            for shard in shards:
                fetch(shard)
            return [directory / shard for shard in shards]
        if files := sorted(directory.glob(pattern)):
            return files
    raise CheckpointError(
        f"{source} has no safetensors weights"
        + ("" if allow_pickle else "; pass --allow-pickle only if you trust where its pickled weights come from")
    )


def _max_tokens(tokenizer: Any, config: Any, family: Family, pad: int) -> int:
    """Most tokens of a text: the model's positions, or fewer if the tokenizer says so."""
    positions = config.max_position_embeddings - (pad + 1 if family.positions_after_pad else 0)
    return int(min(positions, tokenizer.model_max_length))


def _has_types(tokenizer: Any, config: Any) -> bool:
    """Whether a pair has token type ids, as transformers decides: its tokenizer gives them, and the model has two."""
    return getattr(config, "type_vocab_size", 0) > 1 and "token_type_ids" in tokenizer.model_input_names


def _pad_id(tokenizer: Any, config: Any, family: Family, source: str) -> int:
    """The id that texts are padded with: the config's, which is set where it lacks one or names no known token."""
    own, tokens = config.pad_token_id, config.vocab_size
    if own is not None and 0 <= own < tokens:
        return int(own)
    names = f"pad_token_id {own} of {source} is none of its {tokens} tokens"
    if own is not None and family.positions_after_pad:
        raise CheckpointError(f"{names}, and positions are counted from it: correct its config.json")
    others = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((int(each) for each in others if each is not None and 0 <= each < tokens), None)
    if pad is None:
        raise CheckpointError(f"{source} has neither a pad nor an eos token that it knows: texts cannot be batched")
    if own is not None:
        logger.warning("%s: texts are padded with token %d instead", names, pad)
    config.pad_token_id = pad
    return pad


def _known_tokens(tokenizer: Any, config: Any, source: str) -> int | None:
    """For how many tokens the model has embeddings, if the tokenizer can give others."""
    known: int = config.vocab_size
    others = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= known)
    if not others:
        return None
    logger.warning(
        "the tokenizer of %s has tokens that the model has no embedding for (%d: %s): texts that hold one are refused",
        source,
        len(others),
        ", ".join(repr(token) for _, token in others[:3]) + (", …" if len(others) > 3 else ""),
    )
    return known


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

"""A checkpoint's files: where they are, what its config says, and which model they make. Without torch."""

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from workers.models.errors import CheckpointError

HUB_SECONDS = 10.0
"""How long to wait for the hub's answer whether it has a model."""
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Config entries that say how a checkpoint was saved, not what it computes."""


def check_checkpoint(source: str, revision: str | None = None) -> None:
    """Look for a checkpoint before torch is loaded for it.

    Raises:
        CheckpointError: there is no such directory, it holds no checkpoint, or the hub does not have that name.
    """
    place = Path(source).expanduser()
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise CheckpointError(
                f"{source} holds no config.json: name the directory of a checkpoint, as save_pretrained writes it"
            )
    elif place.exists():
        raise CheckpointError(f"{source} is a file: name the directory of a checkpoint")
    elif is_path(source):
        raise CheckpointError(f"no such directory: {source}{_similar(place)}")
    elif (reason := _missing_on_hub(source, revision)) is not None:
        raise CheckpointError(f"no such directory: {source}{_similar(place)}; as a name on the hub, {reason}")


def is_path(source: str) -> bool:
    """Whether it is a path by its form, which no name on the hub has."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(source)
    except HFValidationError:
        return True
    return False


def _missing_on_hub(source: str, revision: str | None) -> str | None:
    """Why the hub does not give the model; None if it does, if it is in the hub's cache, or if loading will say why."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
        return None
    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json", revision=revision), timeout=HUB_SECONDS)
    except GatedRepoError:
        return None
    except RepositoryNotFoundError:
        return "it is not known there"
    except HfHubHTTPError:
        return None
    except OfflineModeIsEnabled:
        return "it is not in the cache, and HF_HUB_OFFLINE is set"
    except Exception as error:  # of whatever makes the connection
        return f"it is not in the cache, and the hub cannot be reached ({error})"
    return None


def _similar(place: Path) -> str:
    """A directory beside it whose name is nearly the same, as a question."""
    try:
        beside = [each.name for each in place.parent.iterdir() if each.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(place.name, beside, n=1, cutoff=0.75)
    return f"; did you mean {place.parent / near[0]}?" if near else ""


def read_checkpoint(source: str, load: Callable[[], Any]) -> Any:
    """The result of `load`; its many kinds of failure as one clear CheckpointError."""
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"cannot load {source!r}: {reason}") from error


def config_entries(source: str, revision: str | None) -> dict[str, Any]:
    """The entries of the checkpoint's config file, without the defaults of transformers."""
    entries: dict[str, Any] = json.loads(_config_file(source, revision).read_bytes())
    return entries


def _config_file(source: str, revision: str | None) -> Path:
    from transformers.utils.hub import cached_file

    return Path(read_checkpoint(source, lambda: cached_file(source, "config.json", revision=revision)))


def weight_files(source: str, revision: str | None, allow_pickle: bool) -> list[Path]:
    """The checkpoint's weight files, by name."""
    from transformers.utils.hub import cached_file

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


def fingerprints(
    entries: Mapping[str, Any], with_defaults: Mapping[str, Any], extra: Mapping[str, Any], files: Sequence[Path]
) -> tuple[str, str]:
    """The fingerprint of a model, and the one that earlier versions computed, each [0-9a-f]{64}.

    Those hashed the config with the defaults of transformers, which a new release may add to. Their range sets are
    still recognized as the model's, as long as these defaults stay.

    Args:
        entries: the checkpoint's own config file. with_defaults: that with the defaults of transformers.
        extra: parts of the model that are not in the checkpoint.
    """
    with ThreadPoolExecutor(2) as both:  # hashing takes seconds of a large model, and lets other threads run
        new, earlier = both.map(lambda config: _digest({**config, **extra}, files), (entries, with_defaults))
    return new, earlier


def _digest(config: Mapping[str, Any], files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    lasting = {key: value for key, value in config.items() if key not in _VOLATILE}
    digest.update(json.dumps(lasting, sort_keys=True, default=str).encode())
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()

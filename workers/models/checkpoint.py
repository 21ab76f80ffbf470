"""A checkpoint's files: what its config says, its weights, and which model they make."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from workers.models.errors import CheckpointError

_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Config entries that say how a checkpoint was saved, not what it computes."""


def read_checkpoint(source: str, load: Callable[[], Any]) -> Any:
    """The result of `load`; its many kinds of failure as one clear CheckpointError."""
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
    return Path(read_checkpoint(source, lambda: cached_file(source, "config.json", revision=revision)))


def weight_files(source: str, revision: str | None, allow_pickle: bool) -> list[Path]:
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

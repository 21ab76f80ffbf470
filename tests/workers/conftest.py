"""Tiny models of every family, loaded once."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.workers.checkpoints import save_tiny
from workers.models.loading import LoadedModel, load_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    """`tiny(family)`: a random three-block model of that family."""

    @cache
    def load(family: str) -> LoadedModel:
        return load_model(str(save_tiny(family, tmp_path_factory.mktemp(family) / "model")), device="cpu")

    return load

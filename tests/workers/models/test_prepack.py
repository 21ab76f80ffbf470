"""Prepacked linear layers give the products of torch's own layers."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.workers.checkpoints import save_tiny
from workers.models.loading import load_model
from workers.models.prepack import STEP, PrepackedLinear, prepack, rounded

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 5), (7, 5), (3, 4, 5)])
@pytest.mark.parametrize("layer", [nn.Linear(5, 6), nn.Linear(5, 6, bias=False), Conv1D(6, 5)])
def test_prepacked_layer_multiplies_as_the_original(
    layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    blocks = nn.Sequential(layer).to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        expected = blocks(x)
    replaced = prepack(blocks, dtype)
    if replaced == 0 and dtype is not torch.float32:
        pytest.fail("this processor has no oneDNN product in bfloat16")
    assert isinstance(blocks[0], PrepackedLinear)
    with torch.inference_mode():
        torch.testing.assert_close(blocks(x), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_layer_with_a_different_product_is_kept() -> None:
    broken = nn.Linear(4, 4)
    with torch.no_grad():
        broken.weight[0, 0] = torch.nan
    blocks = nn.Sequential(broken, nn.Linear(4, 4))
    assert prepack(blocks, torch.float32) == 1
    assert blocks[0] is broken
    assert isinstance(blocks[1], PrepackedLinear)


def test_unsupported_types_are_kept() -> None:
    blocks = nn.Sequential(nn.Linear(4, 4).half())
    assert prepack(blocks, torch.float16) == 0
    assert isinstance(blocks[0], nn.Linear)


@pytest.mark.parametrize(("family", "per_block"), [("bert", 6), ("gpt2", 4), ("llama", 7)])
def test_every_linear_layer_of_a_block_is_replaced(tmp_path: Path, family: str, per_block: int) -> None:
    model = load_model(str(save_tiny(family, tmp_path)), device="cpu")
    for block in model.steered.blocks:
        found = [module for module in block.modules() if isinstance(module, PrepackedLinear)]
        assert len(found) == per_block
        assert not any(isinstance(module, nn.Linear | Conv1D) for module in block.modules())


@given(st.integers(0, 1 << 20))
def test_rounding_adds_few_rows(rows: int) -> None:
    size = rounded(rows)
    assert rows <= size < rows + max(STEP, rows / 16)
    assert rounded(size) == size


def test_rounding_gives_fewer_than_a_hundred_sizes_up_to_1024_rows() -> None:
    assert len({rounded(rows) for rows in range(1, 1025)}) < 100


def test_product_of_a_row_does_not_depend_on_the_number_of_rows() -> None:
    blocks = nn.Sequential(nn.Linear(16, 16))
    x = torch.randn(70, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = blocks(x)
        assert prepack(blocks, torch.float32) == 1
        for rows in (1, 7, 8, 9, 63, 64, 65, 70):
            torch.testing.assert_close(blocks(x[:rows]), expected[:rows], atol=1e-5, rtol=0)

"""Prompts with label strings, or decoded tokens, as branches behind them: one row per text, whatever the labels.

B: texts, P: tokens of the common prefix, T: of the longest text with its suffix, S: branch tokens, R = 1 + S: positions
that are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.models.tokens import TokenBatch


@dataclass(frozen=True, eq=False)
class PromptRows:
    """Prompts with branches behind them.

    Attributes:
        batch, positions: [B, T + S].
        attention: [B, 1, T + S, P + T + S], 0 or the lowest number of its type; it is added to attention scores.
        reads: columns that are read, [B, R].
    """

    batch: TokenBatch
    positions: Tensor
    attention: Tensor
    reads: Tensor

    def rows(self, index: Tensor) -> "PromptRows":
        """The rows of these texts, [V] int64."""
        return PromptRows(self.batch.rows(index), self.positions[index], self.attention[index], self.reads[index])


def with_branches(
    batch: TokenBatch, tokens: Tensor, branches: Sequence[tuple[int, int]], front: int, dtype: torch.dtype
) -> PromptRows:
    """Prompts with `tokens` [B, S] behind them. Each sees the prefix, its prompt, and its own branch so far.

    Args:
        branches: of each token, which branch it is of, and its place in it.
        front: P. dtype: of the attention mask.
    """
    device = batch.ids.device
    texts, width = batch.ids.shape
    n_behind = len(branches)
    # [0] keeps the shape where there is no branch token
    branch = torch.tensor([k for k, _ in branches] or [0], device=device)[:n_behind]
    place = torch.tensor([i for _, i in branches] or [0], device=device)[:n_behind]
    length = batch.mask.sum(dim=1, keepdim=True)
    positions = torch.cat(
        [(front + torch.arange(width, device=device)).expand(texts, -1), front + length + place], dim=1
    )
    seen = torch.zeros((texts, width + n_behind, front + width + n_behind), dtype=torch.bool, device=device)
    seen[:, :, :front] = True
    seen[:, :width, front : front + width] = torch.ones((width, width), device=device).tril().bool()
    seen[:, width:, front : front + width] = batch.mask.unsqueeze(1)
    seen[:, width:, front + width :] = (branch[:, None] == branch) & (place[:, None] >= place)
    also_read = torch.zeros((texts, width + n_behind), dtype=torch.bool, device=device)
    also_read[:, width:] = True
    whole = TokenBatch(
        torch.cat([batch.ids, tokens], dim=1),
        torch.cat([batch.mask, also_read[:, width:]], dim=1),
        batch.read,
        also_read,
    )
    behind_columns = (width + torch.arange(n_behind, device=device)).expand(texts, -1)
    reads = torch.cat([batch.read.unsqueeze(1), behind_columns], dim=1)
    return PromptRows(whole, positions, additive_mask(seen, dtype).unsqueeze(1), reads)


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, and the lowest number of `dtype` elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

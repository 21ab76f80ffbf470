"""Scoring prompts by full passes, one label at a time, with hooks on the edited blocks.

The reference that `FewShotModel` is checked with, and what it does where a model cannot be split.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from range_store.domain.erasure import Site
from workers.models.sites import output_hooks
from workers.models.steerable import Edits, ModulesAt, state_of
from workers.models.tokens import TokenBatch


class FullPasses:
    """Passes over whole prompts, without cache, trunk or branches. The caller holds the model's lock.

    Args:
        model: a transformers `…ForCausalLM`.
        modules_at: what gives the outputs of blocks.
        prefix: token ids that stand before every text.
    """

    def __init__(self, model: Any, modules_at: ModulesAt, prefix: tuple[int, ...]) -> None:
        self._model, self._modules_at, self._prefix = model, modules_at, prefix

    def scores(self, batch: TokenBatch, labels: Sequence[tuple[int, ...]], edits: Edits | None) -> Tensor:
        """Summed log-probabilities of the label strings, [B, K]."""
        sums = []
        for label in labels:
            tokens = torch.tensor(label, device=batch.ids.device).expand(len(batch.ids), -1)
            log = F.log_softmax(self._vocabulary_logits(batch, tokens[:, :-1], edits).float(), dim=-1)
            sums.append(log.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).sum(dim=1))
        return torch.stack(sums, dim=1)

    def decode(self, batch: TokenBatch, tokens: int, edits: Edits | None) -> Tensor:
        """That many greedily decoded tokens, [B, tokens]."""
        decoded = torch.zeros((len(batch.ids), 0), dtype=torch.int64, device=batch.ids.device)
        for _ in range(tokens):
            logits = self._vocabulary_logits(batch, decoded, edits)[:, -1]
            decoded = torch.cat([decoded, logits.argmax(dim=-1, keepdim=True)], dim=1)
        return decoded

    def record(
        self, batch: TokenBatch, layers: Sequence[int], site: Site, position: Literal["read", "mean"]
    ) -> dict[int, Tensor]:
        """States [B, D] per block at the last prompt token, or their mean over text and suffix."""
        recorded: dict[int, Tensor] = {}

        def keep(layer: int, hidden: Tensor) -> Tensor:
            recorded[layer] = state_of(hidden[:, len(self._prefix) :], batch, position)
            return hidden

        with output_hooks(self._modules_at(layers, site), keep):
            self.states(self._with_prefix(batch, None))
        return recorded

    def states(self, batch: TokenBatch, edits: Edits | None = None) -> Tensor:
        """Normed states [B, T, D] after the last block, of a batch as it is."""
        hooks = (
            output_hooks(self._modules_at(edits.layers, edits.site), lambda layer, hidden: edits(layer, hidden, batch))
            if edits is not None
            else nullcontext()
        )
        with hooks:
            mask = batch.mask.to(torch.int64)
            output = self._model.base_model(input_ids=batch.ids, attention_mask=mask, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _vocabulary_logits(self, batch: TokenBatch, behind: Tensor, edits: Edits | None) -> Tensor:
        """Logits over the vocabulary at the last prompt token and each token of `behind` [B, S]: [B, 1 + S, …]."""
        whole = self._with_prefix(batch, behind)
        hidden = self.states(whole, edits)
        columns = whole.read.unsqueeze(1) + torch.arange(1 + behind.shape[1], device=batch.ids.device)
        logits: Tensor = self._model.get_output_embeddings()(
            hidden[torch.arange(len(hidden), device=hidden.device).unsqueeze(1), columns]
        )
        return logits

    def _with_prefix(self, batch: TokenBatch, behind: Tensor | None) -> TokenBatch:
        """Prefix, prompt and the tokens `behind` it as one right-padded batch."""
        device = batch.ids.device
        length = batch.mask.sum(dim=1)
        extra = 0 if behind is None else behind.shape[1]
        front = len(self._prefix)
        prefix = torch.tensor(self._prefix, dtype=torch.int64, device=device).expand(len(batch.ids), -1)
        ids = F.pad(torch.cat([prefix, batch.ids], dim=1), (0, extra))
        column = torch.arange(ids.shape[1], device=device)
        read = front + batch.read
        mask = column < (front + length + extra).unsqueeze(1)
        also_read = (column > read.unsqueeze(1)) & mask
        if behind is not None and extra:
            rows = torch.arange(len(ids), device=device).unsqueeze(1)
            ids[rows, (front + length).unsqueeze(1) + torch.arange(extra, device=device)] = behind
        return TokenBatch(ids, mask, read, also_read)

"""The plain way to score prompts: full passes, one label at a time, with hooks on the masked blocks.

It is the reference that `FewShotModel` is checked with, and what it does where a model cannot be split.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from range_store.domain.erasure import Site
from workers.models.families import Family
from workers.models.steered import Masking, state_of
from workers.models.tokens import TokenBatch


class PlainPrompts:
    """Passes over whole prompts, without cache, trunk or branches. The caller holds the model's lock.

    Args:
        model: a transformers `…ForCausalLM`; prefix: token ids that stand before every text.
    """

    def __init__(self, model: Any, family: Family, prefix: tuple[int, ...]) -> None:
        self._model, self._family, self._prefix = model, family, prefix
        self._blocks: nn.ModuleList = model.get_submodule(family.blocks)

    def scores(self, batch: TokenBatch, labels: Sequence[tuple[int, ...]], masking: Masking | None) -> Tensor:
        """Summed log-probabilities of the label strings, [B, K]."""
        sums = []
        for k, label in enumerate(labels):
            tokens = torch.tensor(label, device=batch.ids.device).expand(len(batch.ids), -1)
            with counted_once(masking, k == 0):
                log = F.log_softmax(self._head(batch, tokens[:, :-1], masking).float(), dim=-1)
            sums.append(log.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).sum(dim=1))
        return torch.stack(sums, dim=1)

    def decoded(self, batch: TokenBatch, tokens: int, masking: Masking | None) -> Tensor:
        """So many greedily decoded tokens, [B, tokens]."""
        said = torch.zeros((len(batch.ids), 0), dtype=torch.int64, device=batch.ids.device)
        for step in range(tokens):
            with counted_once(masking, step == 0):
                scores = self._head(batch, said, masking)[:, -1]
            said = torch.cat([said, scores.argmax(dim=-1, keepdim=True)], dim=1)
        return said

    def record(
        self, batch: TokenBatch, layers: Sequence[int], site: Site, position: Literal["read", "mean"]
    ) -> dict[int, Tensor]:
        """States [B, D] per layer at the last prompt token, or their mean over text + suffix."""
        recorded: dict[int, Tensor] = {}

        def keep(layer: int, hidden: Tensor, whole: TokenBatch) -> Tensor:
            recorded[layer] = state_of(hidden[:, len(self._prefix) :], batch, position)
            return hidden

        whole = self._in_front(batch, None)
        with self._hooks(layers, site, keep, whole):
            self._body(whole)
        return recorded

    def _head(self, batch: TokenBatch, behind: Tensor, masking: Masking | None) -> Tensor:
        """Scores over the vocabulary at the last prompt token and each token of `behind` [B, S]: [B, 1 + S, …]."""
        whole = self._in_front(batch, behind)
        if masking is None:
            hidden = self._body(whole)
        else:
            with self._hooks(masking.layers, masking.site, masking, whole):
                hidden = self._body(whole)
        columns = whole.read.unsqueeze(1) + torch.arange(1 + behind.shape[1], device=batch.ids.device)
        head: Tensor = self._model.get_output_embeddings()(
            hidden[torch.arange(len(hidden), device=hidden.device).unsqueeze(1), columns]
        )
        return head

    def _in_front(self, batch: TokenBatch, behind: Tensor | None) -> TokenBatch:
        """Prefix, prompt and the tokens `behind` it as one right-padded batch."""
        device = batch.ids.device
        length = batch.mask.sum(dim=1)
        extra = 0 if behind is None else behind.shape[1]
        front = len(self._prefix)
        prefix = torch.tensor(self._prefix, dtype=torch.int64, device=device).expand(len(batch.ids), -1)
        ids = F.pad(torch.cat([prefix, batch.ids], dim=1), (0, extra))
        column = torch.arange(ids.shape[1], device=device)
        read = front + batch.read
        also_read = (column > read.unsqueeze(1)) & (column < (front + length + extra).unsqueeze(1))
        if behind is not None and extra:
            rows = torch.arange(len(ids), device=device).unsqueeze(1)
            ids[rows, (front + length).unsqueeze(1) + torch.arange(extra, device=device)] = behind
        return TokenBatch(ids, column < (front + length + extra).unsqueeze(1), read, also_read)

    def _body(self, batch: TokenBatch) -> Tensor:
        output = self._model.base_model(input_ids=batch.ids, attention_mask=batch.mask.to(torch.int64), use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @contextmanager
    def _hooks(
        self,
        layers: Collection[int],
        site: Site,
        change: Callable[[int, Tensor, TokenBatch], Tensor],
        batch: TokenBatch,
    ) -> Iterator[None]:
        def hook(layer: int) -> Callable[[nn.Module, Any, Any], Any]:
            def apply(module: nn.Module, args: Any, output: Any) -> Any:
                if not isinstance(output, tuple):
                    return change(layer, output, batch)
                return (change(layer, output[0], batch), *output[1:])

            return apply

        places = {layer: self._blocks[layer] for layer in layers}
        if site == "mlp_output":
            places = {layer: block.get_submodule(self._family.mlp) for layer, block in places.items()}
        handles = [place.register_forward_hook(hook(layer)) for layer, place in places.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def counted_once(masking: Masking | None, first: bool) -> Iterator[None]:
    """Masked neurons at the read position are counted in one of several passes over the same text."""
    before = getattr(masking, "masked", None)
    yield
    if not first and before is not None:
        masking.masked = before  # type: ignore[union-attr]

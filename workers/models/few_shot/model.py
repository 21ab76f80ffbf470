"""A pretrained causal LM as a few-shot classifier, steered at any block.

The prompt of a text is: common prefix (instruction, exemplars) + text + suffix. Its score for a label is the sum of the
log-probabilities of the label string's tokens after the prompt. All labels of a text are scored in one row: the strings
stand after the prompt as branches, each of which sees the prompt and its own earlier tokens only.

The prefix is computed once. Up to the lowest edited block nothing depends on a plan (edits act on the output of a
block), so keys and values of the prefix are shared there; above, they are kept per plan, bounded in bytes.

B: texts, V: variants, P: tokens of the prefix, T: of the longest text with its suffix, S: branch tokens, D: hidden
size, K: labels, R = 1 + S: positions that are read.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from range_store.domain.erasure import Site
from workers.models.families import Family
from workers.models.few_shot.full_passes import FullPasses
from workers.models.few_shot.prefixes import PrefixCache, Prefixes
from workers.models.few_shot.prompt_rows import PromptRows, additive_mask, with_branches
from workers.models.sites import ForwardPass, with_sites
from workers.models.steerable import Edits, SteerableModel, Trunk, state_of
from workers.models.tokens import TokenBatch

logger = logging.getLogger(__name__)

Scoring = Literal["restricted", "greedy"]
LOGITS_AT_ONCE = 1 << 25
"""Logits over the vocabulary that are computed together: 128 MB in float32."""
NOT_DECODED = -30.0
"""Greedy score of a label that was not decoded; the one that was has 0."""


class FewShotModel(SteerableModel):
    """A prompted language model; a `TokenBatch` given to it holds text and suffix, read at the last token.

    Args:
        model: a transformers `…ForCausalLM` in eval mode.
        prefix: token ids of the common prefix. labels: token ids of each label's string.
        scoring: "restricted": log-probabilities of the label strings; "greedy" (the paper's released code): five tokens
            are decoded, and the label that they begin with has 0, every other one `NOT_DECODED`.
        decode, label_texts: tokens to text, and the label strings; for "greedy".
        prefix_bytes: most bytes of prefix states that are kept for plans.
    """

    GREEDY_TOKENS: ClassVar[int] = 5
    language_model = True

    def __init__(
        self,
        model: Any,
        family: Family,
        prefix: tuple[int, ...],
        labels: tuple[tuple[int, ...], ...],
        *,
        scoring: Scoring = "restricted",
        decode: Callable[[list[int]], str] | None = None,
        label_texts: tuple[str, ...] = (),
        prefix_bytes: int = 256 << 20,
    ) -> None:
        if not all(labels):
            raise ValueError("a label has no token")
        super().__init__(model, family)
        self.prefix, self.labels, self.scoring = prefix, labels, scoring
        self.head = "greedy" if scoring == "greedy" else None
        self._decode, self._label_texts = decode, label_texts
        # blocks with a sliding window would need masks of their own: they take full passes
        self.splits = "sliding_attention" not in (getattr(model.config, "layer_types", None) or ())
        path = family.blocks.removeprefix(f"{model.base_model_prefix}.")
        self._sited = with_sites(model.base_model, path, self.blocks, lambda: self._current)
        self._full_passes = FullPasses(model, self._modules_at, prefix)
        self._prefixes = Prefixes(self._run_prefix, self.n_layers, prefix_bytes)
        self._branches = [(k, i) for k, label in enumerate(labels) for i in range(len(label) - 1)]

    @property
    def shares_trunks(self) -> bool:
        return self.splits and self.scoring == "restricted"

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes of prefix states that are kept for plans."""
        return self._prefixes.nbytes

    @property
    def text_start(self) -> tuple[int, ...]:
        bos = self.model.config.bos_token_id
        return (bos,) if self.prefix[:1] == (bos,) else ()

    def tail_width(self, batch: TokenBatch, split: int | None) -> int:
        if self.shares_trunks and split == self.n_layers - 1:
            return 1 + len(self._branches)
        return batch.ids.shape[1]

    def logits(self, batch: TokenBatch) -> Tensor:
        """The bare model's score of every label, [B, K]."""
        with self._lock, torch.inference_mode():
            if not self.splits:
                return self._in_full(batch, None)
            if self.scoring == "greedy":
                return self._greedy(batch, None)
            rows = self._with_labels(batch)
            return self._scores(self._run(ForwardPass(), rows, self._prefixes.bare(batch.ids.device)), rows.reads)

    def record(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        site: Site = "block_output",
        position: Literal["read", "mean"] = "read",
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """See `SteerableModel`; the mean is over text and suffix."""
        if self.shares_trunks and site == "block_output":
            trunks = self._trunks(batch, layers, whole=True)
            assert trunks[0].logits is not None
            width = batch.ids.shape[1]
            states = [
                state_of(trunk.hidden[:, :width], batch, position) for trunk in trunks if trunk.hidden is not None
            ]
            return trunks[0].logits, dict(zip(layers, states, strict=True))
        with self._lock, torch.inference_mode():
            return self.logits(batch), self._full_passes.record(batch, layers, site, position)

    def _trunks(self, batch: TokenBatch, splits: Sequence[int], whole: bool) -> list[Trunk]:
        """Hidden states [B, T + S, D] after each of `splits`."""
        with self._lock, torch.inference_mode():
            rows = self._with_labels(batch)
            now = ForwardPass(record=frozenset(splits), stop_after=None if whole else max(splits))
            hidden = self._run(now, rows, self._prefixes.bare(batch.ids.device))
            logits = self._scores(hidden, rows.reads) if whole else None
            return [Trunk(split, now.recorded[split], logits) for split in splits]

    def _tail(self, batch: TokenBatch, split: int, hidden: Tensor, rows: Tensor, edits: Edits) -> Tensor:
        with self._lock, torch.inference_mode():
            whole = self._with_labels(batch)
            if split == self.n_layers - 1:
                return self._last_block(hidden, split, whole, rows, edits)
            tail = whole.rows(rows)
            states = hidden[rows]
            if split in edits.layers:
                states = edits(split, states, tail.batch)
            now = _edited(edits, tail.batch)
            now.inject = (split, states)
            return self._scores(self._run(now, tail, self._prefixes.edited(split, edits, rows.device)), tail.reads)

    def _full_pass(self, batch: TokenBatch, edits: Edits) -> Tensor:
        if self.splits and self.scoring == "greedy" and edits.site == "block_output":
            with self._lock, torch.inference_mode():
                return self._greedy(batch, edits)
        return self.hooked(batch, edits)

    def hooked(self, batch: TokenBatch, edits: Edits) -> Tensor:
        """Scores [B, K] by full passes, one label at a time, with a hook on each edited block: the reference."""
        with self._lock, torch.inference_mode():
            return self._in_full(batch, edits)

    def check(self, batch: TokenBatch) -> None:
        """See `SteerableModel`; also logs each label that can never score below another.

        Runs with a short prefix and the longest few labels of the same model: what could differ is the way (a label of
        one token makes no branch), not the length, and full passes over long prompts at every block take minutes.
        """
        if self.scoring == "restricted":
            self._log_labels_that_begin_others()
        if self.splits:
            longest = tuple(sorted(self.labels, key=len)[-3:])
            self.splits = FewShotModel(self.model, self.family, self.prefix[:8], longest).agrees(batch)

    def _log_labels_that_begin_others(self) -> None:
        """Every further token of a label only lowers its sum."""
        names = self._label_texts or tuple(map(str, self.labels))
        for k, short in enumerate(self.labels):
            longer = [names[j] for j, label in enumerate(self.labels) if j != k and label[: len(short)] == short]
            if longer:
                logger.warning("label %r begins and so never scores below %s: use other label texts", names[k], longer)

    def negative_log_likelihood(self, batch: TokenBatch, edits: Edits | None) -> float:
        head = self.model.get_output_embeddings()
        with self._lock, torch.inference_mode():
            states = self._full_passes.states(batch, edits)
            predicted = batch.mask[:, 1:]
            hidden, tokens = states[:, :-1][predicted], batch.ids[:, 1:][predicted]
            at_once = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
            return sum(
                float(F.cross_entropy(head(some).float(), chosen, reduction="none").sum(dtype=torch.float64))
                for some, chosen in zip(torch.split(hidden, at_once), torch.split(tokens, at_once), strict=True)
            )

    # One row per text, all labels in it

    def _with_labels(self, batch: TokenBatch) -> PromptRows:
        """The prompts with the first tokens of every label's string, all but the last, behind them."""
        tokens = [self.labels[k][i] for k, i in self._branches]
        row = torch.tensor(tokens, dtype=torch.int64, device=batch.ids.device)
        return self._with_branches(batch, row.expand(len(batch.ids), -1), self._branches)

    def _with_branches(self, batch: TokenBatch, tokens: Tensor, branches: Sequence[tuple[int, int]]) -> PromptRows:
        return with_branches(batch, tokens, branches, len(self.prefix), next(self.model.parameters()).dtype)

    def _run(self, now: ForwardPass, rows: PromptRows, prefix: PrefixCache) -> Tensor:
        """One pass of the body; its normed hidden states [B, T + S, D]."""
        self._current = now
        try:
            output = self._sited(
                input_ids=rows.batch.ids,
                attention_mask=rows.attention,
                position_ids=rows.positions,
                past_key_values=prefix,
                use_cache=False,
            )
        finally:
            self._current = ForwardPass()
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _run_prefix(self, now: ForwardPass, keep: PrefixCache, device: torch.device) -> None:
        """Run the prefix alone; `keep` takes its keys and values."""
        batch = TokenBatch.full(torch.tensor([self.prefix], dtype=torch.int64, device=device))
        length = len(self.prefix)
        seen = torch.ones((1, 1, length, length), device=device).tril().bool()
        positions = torch.arange(length, device=device).unsqueeze(0)
        attention = additive_mask(seen, next(self.model.parameters()).dtype)
        self._run(now, PromptRows(batch, positions, attention, positions), keep)

    def _last_block(self, hidden: Tensor, split: int, whole: PromptRows, rows: Tensor, edits: Edits) -> Tensor:
        """The tail of the last block: norm and head, on the positions that are read only."""
        columns = whole.reads[rows]
        states = hidden[rows.unsqueeze(1), columns]  # [V, R, D]
        ids = whole.batch.ids[rows.unsqueeze(1), columns]
        also_read = torch.ones_like(ids, dtype=torch.bool)
        also_read[:, 0] = False
        batch = TokenBatch(ids, torch.ones_like(also_read), torch.zeros_like(rows), also_read)
        if split in edits.layers:
            states = edits(split, states, batch)
        reads = torch.arange(columns.shape[1], device=rows.device).expand(len(rows), -1)
        nothing = torch.zeros((1, 1, 1, 1), device=rows.device)  # no block runs that would look at it
        now = ForwardPass(inject=(split, states))
        normed = self._run(now, PromptRows(batch, torch.zeros_like(ids), nothing, reads), PrefixCache())
        return self._scores(normed, reads)

    def _scores(self, hidden: Tensor, reads: Tensor) -> Tensor:
        """Summed log-probabilities of the label strings, [B, K]; the head runs on read positions only."""
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        at_once = max(1, LOGITS_AT_ONCE // (reads.shape[1] * vocabulary))
        parts = zip(torch.split(hidden, at_once), torch.split(reads, at_once), strict=True)
        return torch.cat([self._scores_at_once(some, of_them) for some, of_them in parts])

    def _scores_at_once(self, hidden: Tensor, reads: Tensor) -> Tensor:
        index = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
        head = self.model.get_output_embeddings()
        log = F.log_softmax(head(hidden[index, reads]).float(), dim=-1)  # [B, R, vocabulary]
        column = {branch: 1 + place for place, branch in enumerate(self._branches)}
        sums = []
        for k, label in enumerate(self.labels):
            parts = [log[:, 0 if i == 0 else column[k, i - 1], token] for i, token in enumerate(label)]
            sums.append(torch.stack(parts).sum(dim=0))
        return torch.stack(sums, dim=1)

    def _in_full(self, batch: TokenBatch, edits: Edits | None) -> Tensor:
        """Scores [B, K] by full passes."""
        if self.scoring == "greedy":
            return self._decoded_scores(self._full_passes.decode(batch, self.GREEDY_TOKENS, edits))
        return self._full_passes.scores(batch, self.labels, edits)

    # Greedy decoding, as the released code does

    def _greedy(self, batch: TokenBatch, edits: Edits | None) -> Tensor:
        device = batch.ids.device
        prefix = self._prefixes.bare(device)
        last = self.n_layers - 1
        lowest = last if edits is None else min(edits.layers, default=last)
        if edits is not None and lowest < last:  # no block above the last one has keys of a plan
            prefix = self._prefixes.edited(lowest, edits, device)
        decoded = torch.zeros((len(batch.ids), 0), dtype=torch.int64, device=device)
        for step in range(self.GREEDY_TOKENS):
            rows = self._with_branches(batch, decoded, [(0, i) for i in range(step)])
            now = ForwardPass() if edits is None else _edited(edits, rows.batch)
            hidden = self._run(now, rows, prefix)
            states = hidden[torch.arange(len(hidden), device=device), rows.reads[:, -1]]
            chosen = self.model.get_output_embeddings()(states).argmax(dim=-1, keepdim=True)
            decoded = torch.cat([decoded, chosen], dim=1)
        return self._decoded_scores(decoded)

    def _decoded_scores(self, tokens: Tensor) -> Tensor:
        """Scores [B, K] of decoded tokens [B, 5]: the longest label that they begin with."""
        assert self._decode is not None
        scores = torch.full((len(tokens), len(self.labels)), NOT_DECODED, device=tokens.device)
        by_length = sorted(range(len(self.labels)), key=lambda k: -len(self._label_texts[k].strip()))
        for row, ids in enumerate(tokens.tolist()):
            text = self._decode(ids).strip().casefold()
            found = next((k for k in by_length if text.startswith(self._label_texts[k].strip().casefold())), None)
            if found is not None:
                scores[row, found] = 0.0
        return scores


def _edited(edits: Edits, batch: TokenBatch) -> ForwardPass:
    return ForwardPass(edit=lambda layer, hidden: edits(layer, hidden, batch), edit_layers=edits.layers)

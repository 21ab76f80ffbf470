"""A pretrained causal LM as a few-shot classifier, steered at any block.

The prompt of a text is: common prefix (instruction, exemplars) + text + suffix. Its score for a label is the sum of the
log-probabilities of the label string's tokens after the prompt. All labels of a text are scored in one row: the strings
stand after the prompt as branches, each of which sees the prompt and its own earlier tokens only.

The prefix is computed once. Up to the lowest masked block nothing depends on a plan (masks act on what a block gives),
so keys and values of the prefix are shared there; above, they are kept per plan, bounded in bytes (`prefixes.py`).

B: texts, V: variants, P: tokens of the prefix, T: of the longest text with its suffix, S: branch tokens, D: hidden
size, K: labels, R = 1 + S: positions that are read.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from range_store.domain.erasure import Site
from workers.models.families import Family
from workers.models.plain_prompts import PlainPrompts, counted_once
from workers.models.prefixes import PrefixCache, Prefixes
from workers.models.prompt_rows import PromptRows, behind
from workers.models.steered import SPLIT_TOLERANCE, BlockSite, HalfZero, Masking, Pass, Trunk, state_of, with_submodule
from workers.models.tokens import TokenBatch

logger = logging.getLogger(__name__)

Scoring = Literal["restricted", "greedy"]
LOGITS_AT_ONCE = 1 << 25
"""Logits over the vocabulary that are computed together: 128 MB in float32."""
UNSAID = -30.0
"""Greedy score of a label that was not decoded; the one that was has 0."""


class FewShotModel:
    """Has the public face of `SteeredModel`; a `TokenBatch` given to it holds text + suffix, read at the last token.

    One forward pass at a time: calls from several threads wait for each other.

    Args:
        model: a transformers `…ForCausalLM` in eval mode.
        prefix: token ids of the common prefix. labels: token ids of each label's string.
        scoring: "restricted": log-probabilities of the label strings; "greedy" (the released code's): five tokens are
            decoded, and the label that they begin with has 0, every other one `UNSAID`.
        decode, label_texts: tokens to text, and the label strings; for "greedy".
        prefix_bytes: most bytes of prefix states that are kept for plans.
    """

    GREEDY_TOKENS: ClassVar[int] = 5

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
        self.model, self.family = model, family
        self.prefix, self.labels, self.scoring = prefix, labels, scoring
        self._decode, self._label_texts = decode, label_texts
        blocks = model.get_submodule(family.blocks)
        self.blocks: nn.ModuleList = blocks
        self.n_layers = len(blocks)
        # blocks that see a window only would need masks of their own: they take the plain way
        self.splits = "sliding_attention" not in (getattr(model.config, "layer_types", None) or ())
        self.current = Pass()
        self._lock = threading.RLock()
        sites = nn.ModuleList(BlockSite(index, block, self) for index, block in enumerate(blocks))
        path = family.blocks.removeprefix(f"{model.base_model_prefix}.").split(".")
        self._sited = with_submodule(model.base_model, path, sites)
        self._plain = PlainPrompts(model, family, prefix)
        self._prefixes = Prefixes(self._prefix_pass, self.n_layers, prefix_bytes)
        self._branches = [(k, i) for k, label in enumerate(labels) for i in range(len(label) - 1)]

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes of prefix states that are kept for plans."""
        return self._prefixes.nbytes

    def tail_width(self, batch: TokenBatch, split: int) -> int:
        """Padded tokens of one variant in the tail above block `split`: the whole text where nothing is shared."""
        if self.splits and self.scoring == "restricted" and split == self.n_layers - 1:
            return 1 + len(self._branches)
        return batch.ids.shape[1]

    def logits(self, batch: TokenBatch) -> Tensor:
        """The unmasked model's score of every label, [B, K]."""
        with self._lock, torch.inference_mode():
            if not self.splits:
                return self._in_full(batch, None)
            if self.scoring == "greedy":
                return self._greedy(batch, None)
            rows = self._with_branches(batch)
            return self._scores(self._run(Pass(), rows, self._prefixes.unmasked(batch.ids.device)), rows.reads)

    def record(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        site: Site = "block_output",
        position: Literal["read", "mean"] = "read",
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Scores [B, K], and per layer the states [B, D] at the last prompt token, or their mean over text + suffix."""
        if self.splits and site == "block_output" and self.scoring == "restricted":
            trunks = self.trunks(batch, list(layers), whole=True)
            assert trunks[0].logits is not None
            width = batch.ids.shape[1]
            return trunks[0].logits, {t.split: state_of(t.hidden[:, :width], batch, position) for t in trunks}
        with self._lock, torch.inference_mode():
            return self.logits(batch), self._plain.record(batch, layers, site, position)

    def trunk(self, batch: TokenBatch, split: int, *, whole: bool) -> Trunk:
        """Hidden states after block `split`; see `trunks`."""
        return self.trunks(batch, [split], whole=whole)[0]

    def trunks(self, batch: TokenBatch, splits: Sequence[int], *, whole: bool) -> list[Trunk]:
        """Hidden states [B, T + S, D] after each of `splits`, all from one pass; `whole` gives the scores too."""
        if not self.splits or self.scoring == "greedy":  # nothing to share: `steer` runs whole passes
            empty = torch.empty(0, device=batch.ids.device)
            logits = self.logits(batch) if whole else None
            return [Trunk(split, empty, logits) for split in splits]
        with self._lock, torch.inference_mode():
            rows = self._with_branches(batch)
            now = Pass(record=frozenset(splits), stop_after=None if whole else max(splits))
            hidden = self._run(now, rows, self._prefixes.unmasked(batch.ids.device))
            logits = self._scores(hidden, rows.reads) if whole else None
            return [Trunk(split, now.recorded[split], logits) for split in splits]

    def steer(self, batch: TokenBatch, trunk: Trunk, rows: Tensor, masking: Masking) -> Tensor:
        """Scores [V, K] of masked variants of the trunk's texts.

        Args:
            rows: the text of each variant, [V] int64.
            masking: its layers are `trunk.split` or above.
        """
        if not self.splits or masking.site != "block_output":
            return self.hooked(batch.rows(rows), masking)
        with self._lock, torch.inference_mode():
            if self.scoring == "greedy":
                return self._greedy(batch.rows(rows), masking)
            whole = self._with_branches(batch)
            if trunk.split == self.n_layers - 1:
                return self._last_block(trunk, whole, rows, masking)
            tail = whole.rows(rows)
            hidden = trunk.hidden[rows]
            if trunk.split in masking.layers:
                hidden = masking(trunk.split, hidden, tail.batch)
            now = self._masked(masking, tail.batch)
            now.inject = (trunk.split, hidden)
            return self._scores(self._run(now, tail, self._prefixes.of(trunk.split, masking, rows.device)), tail.reads)

    def hooked(self, batch: TokenBatch, masking: Masking) -> Tensor:
        """Scores [B, K] by full passes, one label at a time, with a hook on each masked block: the reference."""
        with self._lock, torch.inference_mode():
            return self._in_full(batch, masking)

    def check(self, batch: TokenBatch) -> None:
        """Compares every way that is taken with plain passes, and gives up splitting if they differ.

        Run once at load, with a short prefix and the longest few labels of the same model: what could differ is the
        way (a label of one token makes no branch), not the length, and a plain pass over long prompts at every block
        would take minutes. A label that can never score below another is logged.
        """
        if self.scoring == "restricted":
            self._report_prefixes()
        if not self.splits:
            return
        tolerance = SPLIT_TOLERANCE.get(next(self.model.parameters()).dtype, 1e-5)
        twin = FewShotModel(self.model, self.family, self.prefix[:8], tuple(sorted(self.labels, key=len)[-3:]))
        index = torch.arange(len(batch.ids), device=batch.ids.device)
        try:
            for layer in range(self.n_layers):
                masking = HalfZero(layer)
                split = twin.steer(batch, twin.trunk(batch, layer, whole=False), index, masking).float()
                full = twin.hooked(batch, masking).float()
                if not bool(((split - full).abs() <= tolerance * full.abs().clamp(min=1)).all()):
                    self.splits = False
                    return
        except torch.OutOfMemoryError:
            raise
        except (TypeError, AttributeError, KeyError, RuntimeError, IndexError):
            self.splits = False

    def _report_prefixes(self) -> None:
        """Log each label whose string begins another's: every further token only lowers the other's sum."""
        names = self._label_texts or tuple(map(str, self.labels))
        for k, short in enumerate(self.labels):
            longer = [names[j] for j, label in enumerate(self.labels) if j != k and label[: len(short)] == short]
            if longer:
                logger.warning("label %r begins and so never scores below %s: use other label texts", names[k], longer)

    # One row per text, all labels in it

    def _with_branches(self, batch: TokenBatch) -> PromptRows:
        """The prompts with the first tokens of every label's string, all but the last, behind them."""
        tokens = [self.labels[k][i] for k, i in self._branches]
        row = torch.tensor(tokens, dtype=torch.int64, device=batch.ids.device)
        return self._behind(batch, row.expand(len(batch.ids), -1), self._branches)

    def _behind(self, batch: TokenBatch, tokens: Tensor, branches: Sequence[tuple[int, int]]) -> PromptRows:
        return behind(batch, tokens, branches, len(self.prefix), next(self.model.parameters()).dtype)

    def _run(self, now: Pass, rows: PromptRows, prefix: PrefixCache) -> Tensor:
        """One pass of the body; its normed hidden states [B, T + S, D]."""
        self.current = now
        try:
            output = self._sited(
                input_ids=rows.batch.ids,
                attention_mask=rows.attention,
                position_ids=rows.positions,
                past_key_values=prefix,
                use_cache=False,
            )
        finally:
            self.current = Pass()
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _prefix_pass(self, now: Pass, keep: PrefixCache, device: torch.device) -> None:
        """Run the prefix alone; `keep` takes its keys and values."""
        ids = torch.tensor([self.prefix], dtype=torch.int64, device=device)
        batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids[:, 0]))
        length = len(self.prefix)
        dtype = next(self.model.parameters()).dtype
        seen = torch.ones((1, 1, length, length), device=device).tril().bool()
        attention = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
        positions = torch.arange(length, device=device).unsqueeze(0)
        self._run(now, PromptRows(batch, positions, attention, positions), keep)

    def _masked(self, masking: Masking, batch: TokenBatch) -> Pass:
        return Pass(mask=lambda layer, states: masking(layer, states, batch), mask_layers=masking.layers)

    def _last_block(self, trunk: Trunk, whole: PromptRows, rows: Tensor, masking: Masking) -> Tensor:
        """The tail of the last block: norm and head, on the positions that are read only."""
        columns = whole.reads[rows]
        hidden = trunk.hidden[rows.unsqueeze(1), columns]  # [V, R, D]
        ids = whole.batch.ids[rows.unsqueeze(1), columns]
        also_read = torch.ones_like(ids, dtype=torch.bool)
        also_read[:, 0] = False
        batch = TokenBatch(ids, torch.ones_like(also_read), torch.zeros_like(rows), also_read)
        if trunk.split in masking.layers:
            hidden = masking(trunk.split, hidden, batch)
        reads = torch.arange(columns.shape[1], device=rows.device).expand(len(rows), -1)
        nothing = torch.zeros((1, 1, 1, 1), device=rows.device)  # no block runs that would look at it
        now = Pass(inject=(trunk.split, hidden))
        normed = self._run(now, PromptRows(batch, torch.zeros_like(ids), nothing, reads), PrefixCache.none())
        return self._scores(normed, reads)

    def _scores(self, hidden: Tensor, reads: Tensor) -> Tensor:
        """Summed log-probabilities of the label strings, [B, K]; the head runs on read positions only."""
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        at_once = max(1, LOGITS_AT_ONCE // (reads.shape[1] * vocabulary))
        parts = zip(torch.split(hidden, at_once), torch.split(reads, at_once), strict=True)
        return torch.cat([self._scores_at_once(some, of_them) for some, of_them in parts])

    def _scores_at_once(self, hidden: Tensor, reads: Tensor) -> Tensor:
        index = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
        log = F.log_softmax(
            self.model.get_output_embeddings()(hidden[index, reads]).float(), dim=-1
        )  # [B, R, vocabulary]
        column = {branch: 1 + place for place, branch in enumerate(self._branches)}
        sums = []
        for k, label in enumerate(self.labels):
            parts = [log[:, 0 if i == 0 else column[k, i - 1], token] for i, token in enumerate(label)]
            sums.append(torch.stack(parts).sum(dim=0))
        return torch.stack(sums, dim=1)

    def _in_full(self, batch: TokenBatch, masking: Masking | None) -> Tensor:
        """Scores [B, K] the plain way."""
        if self.scoring == "greedy":
            return self._said(self._plain.decoded(batch, self.GREEDY_TOKENS, masking))
        return self._plain.scores(batch, self.labels, masking)

    # Greedy decoding, as the released code does

    def _greedy(self, batch: TokenBatch, masking: Masking | None) -> Tensor:
        device = batch.ids.device
        prefix = self._prefixes.unmasked(device)
        lowest = self.n_layers - 1 if masking is None else min(masking.layers, default=self.n_layers - 1)
        if masking is not None and lowest < self.n_layers - 1:  # no block above the last one has keys of a plan
            prefix = self._prefixes.of(lowest, masking, device)
        said = torch.zeros((len(batch.ids), 0), dtype=torch.int64, device=device)
        for step in range(self.GREEDY_TOKENS):
            rows = self._behind(batch, said, [(0, i) for i in range(step)])
            with counted_once(masking, step == 0):
                now = Pass() if masking is None else self._masked(masking, rows.batch)
                hidden = self._run(now, rows, prefix)
            last = hidden[torch.arange(len(hidden), device=device), rows.reads[:, -1]]
            said = torch.cat([said, self.model.get_output_embeddings()(last).argmax(dim=-1, keepdim=True)], dim=1)
        return self._said(said)

    def _said(self, tokens: Tensor) -> Tensor:
        """Scores [B, K] of decoded tokens [B, 5]: the longest label that they begin with."""
        assert self._decode is not None
        scores = torch.full((len(tokens), len(self.labels)), UNSAID, device=tokens.device)
        by_length = sorted(range(len(self.labels)), key=lambda k: -len(self._label_texts[k].strip()))
        for row, ids in enumerate(tokens.tolist()):
            text = self._decode(ids).strip().casefold()
            found = next((k for k in by_length if text.startswith(self._label_texts[k].strip().casefold())), None)
            if found is not None:
                scores[row, found] = 0.0
        return scores

"""Speed on a GPU: the bare model, and the engine's forward step unmasked, masked, compared and mixed.

    python benchmarks/gpu.py                       # BERT-base, GPT-2 small and Llama-3.2-3B shapes, bfloat16
    python benchmarks/gpu.py --shapes tiny --device cpu --dtype float32    # does it run at all?

Needs torch, transformers and this repository only: weights are random, texts are random token ids of news-like lengths
(52 tokens on average), nothing is read from a network or a store. All cases of a shape are timed one after the other in
every round; medians are printed, with their ratio to the bare model. The bare model is given padded batches that lie on
the device already; the engine's step makes its batches from token ids, as it does when it serves. "matrix" is the share
of this card's own measured matrix rate that the bare model reaches, by 2 · parameters · padded tokens. The mask alone
is timed on the hidden states of a whole batch, beside the bytes that it must move: one read and one write of them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from range_store.domain.plan import LayerEdits, Plan
from workers.edits.batch_edits import BatchEdits
from workers.edits.slot_table import SlotTable
from workers.edits.variants import Variants
from workers.models.families import family_of
from workers.models.steered import SteeredModel
from workers.models.tokens import Encoded, TextTokenizer, TokenBatch, length_sorted

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("bert", {}),
    "gpt2-small": ("gpt2", {}),
    "llama-3.2-3b": (
        "llama",
        {
            "vocab_size": 128_256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "max_position_embeddings": 2048,
        },
    ),
    "tiny": ("bert", {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}),
}
DEFAULT = "bert-base,gpt2-small,llama-3.2-3b"
PLANS = 32
LABELS = 4


@dataclass(frozen=True)
class Measured:
    """One shape. Rates of the bare model; every other case as its ratio to that."""

    shape: str
    device: str
    dtype: str
    texts_per_second: float
    tokens_per_second: float
    matrix_share: float
    packed: bool
    unmasked: float
    masked: float
    masked_middle: float
    compared: float
    mixed: float
    mask_milliseconds: float
    mask_gigabytes_per_second: float
    mask_share_of_pass: float


def random_plan(seed: int, hidden: int, layer: int) -> Plan:
    """A range plan on three tenths of the neurons."""
    rng = np.random.default_rng(seed)
    low = np.full((1, hidden), np.inf, dtype=np.float32)
    salient = rng.choice(hidden, size=3 * hidden // 10, replace=False)
    low[0, salient] = rng.normal(size=len(salient)) - 1
    high = np.where(np.isfinite(low), low + 2, -np.inf).astype(np.float32)
    nothing = np.zeros_like(low)
    mask = LayerEdits(low, high, np.zeros_like(low, dtype=np.bool_), nothing, nothing)
    return Plan((), {layer: mask}, f"plan {seed} of {layer}")


Rows = list[Encoded]


def batches_of(texts: int, batch_tokens: int, vocabulary: int, longest: int) -> list[Rows]:
    """Texts of random token ids in length-sorted batches."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(46), 0.5, size=texts), 8, longest).astype(int).tolist()
    ids = [Encoded(tuple(rng.integers(10, vocabulary, size=length).tolist())) for length in lengths]
    return [[ids[row] for row in rows] for rows in length_sorted(lengths, batch_tokens)]


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    one, other = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds(lambda: one @ other, device, rounds=10)


def seconds(job: Callable[[], object], device: torch.device, rounds: int = 1) -> float:
    """Median time of a job, everything that it launched on the device included."""
    times = []
    for _ in range(rounds + 2):
        _wait(device)
        started = time.perf_counter()
        job()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    shape: str, device: torch.device, dtype: torch.dtype, texts: int, batch_tokens: int, rounds: int
) -> Measured:
    """All cases of one shape, interleaved."""
    kind, sizes = SHAPES[shape]
    config = AutoConfig.for_model(kind, num_labels=LABELS, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval().requires_grad_(False)
    steered = SteeredModel(model, family_of(kind))
    last, middle = steered.n_layers - 1, steered.n_layers // 2
    longest = min(512, config.max_position_embeddings)
    tokens = TextTokenizer(None, longest, 0, steered.family.reads)  # it pads; there are no texts to tokenize
    rows = batches_of(texts, batch_tokens, config.vocab_size, longest)
    batches = [tokens.batch(some, device) for some in rows]
    steered.check(tokens.batch([rows[0][0], rows[-1][-1]], device))
    if not steered.splits:
        raise SystemExit(f"{shape} cannot be split here: its numbers would be those of whole passes")
    plans = [random_plan(seed, config.hidden_size, last) for seed in range(PLANS)]
    deep = random_plan(99, config.hidden_size, middle)
    table = SlotTable(config.hidden_size, device)

    def over(step: Callable[[TokenBatch], object]) -> Callable[[], None]:
        def run() -> None:
            for some in rows:
                step(tokens.batch(some, device))

        return run

    def erased(batch: TokenBatch, some: list[Plan], split: int, *, whole: bool, every: int = 1) -> None:
        rows = torch.arange(0, len(batch.ids), every, device=device)
        trunk = steered.trunk(batch, split, whole=whole)
        of_rows = [some[row % len(some)] for row in range(0, len(batch.ids), every)]
        variants = Variants(steered, table, batch, trunk, of_rows, rows.unsqueeze(1))
        variants.run_all(batch_tokens).logits.float().cpu()
        if trunk.logits is not None:
            trunk.logits.float().cpu()

    def bare() -> None:
        for batch in batches:
            with torch.inference_mode():
                model(
                    input_ids=batch.ids, attention_mask=batch.mask.to(torch.int64), **steered.family.call
                ).logits.float().cpu()

    jobs: dict[str, Callable[[], None]] = {
        "bare": bare,
        "unmasked": over(lambda batch: steered.logits(batch).float().cpu()),
        "masked": over(lambda batch: erased(batch, plans[:1], last, whole=False)),
        "masked_middle": over(lambda batch: erased(batch, [deep], middle, whole=False)),
        "compared": over(lambda batch: erased(batch, plans[:1], last, whole=True)),
        "mixed": over(lambda batch: erased(batch, plans, last, whole=True, every=2)),
    }
    for job in jobs.values():
        job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            times[name].append(seconds(job, device, rounds=1))
    ratios = {
        name: statistics.median(a / b for a, b in zip(times["bare"], own, strict=True)) for name, own in times.items()
    }
    alone = statistics.median(times["bare"])
    padded = sum(batch.ids.numel() for batch in batches)
    parameters = sum(p.numel() for p in steered.blocks.parameters())
    largest = max(batches, key=lambda batch: batch.ids.numel())
    hidden = torch.randn(*largest.ids.shape, config.hidden_size, device=device, dtype=dtype)
    edits = BatchEdits(table, [plans[row % PLANS] for row in range(len(hidden))])
    mask_time = seconds(lambda: edits(last, hidden, largest), device, rounds=20)
    one_pass = seconds(lambda: steered.logits(largest), device, rounds=5)
    return Measured(
        shape=shape,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        texts_per_second=texts / alone,
        tokens_per_second=sum(int(batch.mask.sum()) for batch in batches) / alone,
        matrix_share=2 * parameters * padded / alone / matrix_rate(device, dtype),
        packed=steered.packs,
        unmasked=ratios["unmasked"],
        masked=ratios["masked"],
        masked_middle=ratios["masked_middle"],
        compared=ratios["compared"],
        mixed=ratios["mixed"],
        mask_milliseconds=1000 * mask_time,
        mask_gigabytes_per_second=2 * hidden.nbytes / mask_time / 1e9,
        mask_share_of_pass=mask_time / one_pass,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=DEFAULT, help=f"out of {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--texts", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    device, dtype = torch.device(asked.device), getattr(torch, asked.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu --shapes tiny --dtype float32 only tries the script out")
    found = []
    for shape in asked.shapes.split(","):
        found.append(measure(shape, device, dtype, asked.texts, asked.batch_tokens, asked.rounds))
        if not asked.json:
            print("\n".join(f"{name:28} {value}" for name, value in asdict(found[-1]).items()), end="\n\n", flush=True)
    if asked.json:
        print(json.dumps([asdict(each) for each in found], indent=1))


if __name__ == "__main__":
    main()

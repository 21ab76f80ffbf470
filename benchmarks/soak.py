"""100,000 random requests at once: no wrong answer, and memory that stays (`make soak`).

    python benchmarks/soak.py --requests 100000
    python benchmarks/soak.py --requests 10000 --model minilm

A small model behind `neuronlens serve` in a process of its own, with ranges at every block: `tiny` has three narrow
blocks of random weights, `minilm` the first two blocks of the demo's classifier. Requests have one to four texts of one
word to several hundred, one of sixty plans of any kind or none, with or without the bare answer beside. Each answer is
compared with that of the text alone: a hooked full pass of a batch of one, masked by code of this file. A logit may be
off by `TOLERANCE`, or by more where some state lies within `NEAR` of a bound of its plan; such cases are counted. Among
them clients hang up, deadlines are too short, and erasures are toggled.
"""

import argparse
import asyncio
import json
import random
import shutil
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from client import Connection, Reply, Server, serving
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from range_store.domain.erasure import Damp, Erasure, Positions, Site
from range_store.domain.plan import Plan, resolve
from range_store.domain.range_set import RangeSet
from range_store.embedded.connection import connect
from range_store.storage.store import RangeStore
from workers.corpora.loading import load_corpus
from workers.demo.demo import CONCEPTS, CORPUS, make_classifier
from workers.fitting.fit import fit
from workers.models.loading import LoadedModel, load_model
from workers.models.tokens import TokenBatch

TOLERANCE = 2e-4
NEAR = 1e-4
NAME = "soak"
BLOCKS = 2
PLANS = 60
FLAT = 0.02
HANG_UP, TOO_SHORT, TOGGLE = 0.01, 0.01, 0.002


class ByHand:
    """The masking of a plan, for one text; remembers how near a state came to a bound."""

    site: Site = "block_output"
    positions: Positions = "all"
    keys = ()

    def __init__(self, plan: Plan) -> None:
        self.plan, self.layers, self.nearest = plan, plan.edits.keys(), float("inf")

    def row(self, variant: int) -> "ByHand":
        return self

    def __call__(self, layer: int, hidden: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        mask = self.plan.edits[layer]
        becomes, done = hidden, torch.zeros_like(hidden, dtype=torch.bool)
        for low, high, always, scale, offset in zip(
            *map(torch.from_numpy, (mask.low, mask.high, mask.always, mask.scale, mask.offset)), strict=True
        ):
            gaps = torch.minimum((hidden - low).abs(), (hidden - high).abs())[..., ~always]
            if gaps.numel():
                self.nearest = min(self.nearest, float(gaps.min()))
            hit = (((hidden >= low) & (hidden <= high)) | always) & ~done
            becomes, done = torch.where(hit, scale * hidden + offset, becomes), done | hit
        return becomes


class Alone:
    """What each text answers by itself."""

    def __init__(
        self, model: LoadedModel, range_set: RangeSet, texts: list[str], plans: list[tuple[Erasure, ...]]
    ) -> None:
        self._model = model
        self._encoded = model.tokens.encode(texts)
        self._plans = [resolve(range_set, plan) for plan in plans]
        self.logits = cache(self._logits)

    def _logits(self, text: int, plan: int) -> tuple[np.ndarray, float]:
        """Logits [K], and the distance of the nearest state from a bound."""
        masking = ByHand(self._plans[plan])
        batch = self._model.tokens.batch([self._encoded[text]])
        return self._model.steered.hooked(batch, masking)[0].numpy(), masking.nearest


def small_model(kind: str, cache_dir: Path) -> Path:
    """`tiny`, or `minilm`: the demo's classifier, cut after its first blocks."""
    whole = make_classifier(cache_dir, lambda *now: None)
    made = cache_dir / f"soak-{kind}"
    shutil.rmtree(made, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(whole)
    if kind == "minilm":
        model = AutoModelForSequenceClassification.from_pretrained(whole, num_hidden_layers=BLOCKS)
    else:
        config = AutoConfig.from_pretrained(whole, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
        config.intermediate_size = 128
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data *= 6  # the usual initialisation is so small that all texts look alike
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def random_texts(rng: random.Random) -> list[str]:
    """Sentences of the demo, single words of them, and long texts made of several."""
    sentences = [json.loads(line)["text"] for line in (CORPUS / "train.jsonl").read_text("utf-8").splitlines()]
    words = [rng.choice(rng.choice(sentences).split()) for _ in range(30)]
    long = [" ".join(rng.sample(sentences, rng.randrange(2, 20))) for _ in range(20)]
    return [*rng.sample(sentences, 150), *words, *long]


def random_plan(rng: random.Random) -> tuple[Erasure, ...]:
    method: Literal["range", "neuron"]
    found = []
    for concept in rng.sample(CONCEPTS, rng.randrange(1, 4)):
        method = "neuron" if rng.random() < 0.3 else "range"
        found.append(
            Erasure(
                concept=concept,
                method=method,
                tau=rng.choice([0.5, 1.0, 2.5]),
                top_fraction=rng.choice([0.1, 0.3, 1.0]),
                ranking=rng.choice(["max", "probeless", "selectivity"]),
                layers=rng.choice([(-1,), (-1,), (0,), "all"]),
                replacement=rng.choice(["zero", "mean", Damp(damp=0.5)]),
            )
        )
    return tuple(found)


def as_json(plan: tuple[Erasure, ...]) -> list[dict[str, Any]]:
    """The plan as `erase` of a request."""
    said = []
    for erasure in plan:
        fields = erasure.model_dump(mode="json", exclude={"layers", "rule"})
        layers = erasure.layers
        said.append({**fields, "layer": layers if isinstance(layers, str) else list(layers)})
    return said


class Soak:
    """Sends random requests, and checks what comes back."""

    def __init__(self, server: Server, alone: Alone, texts: list[str], plans: list[tuple[Erasure, ...]]) -> None:
        self._server, self._alone, self._texts = server, alone, texts
        self._erase = [as_json(plan) for plan in plans]
        self._rng = random.Random(1)
        self.ends: Counter[str] = Counter()
        self.memory: list[int] = []
        self.largest = 0.0

    async def run(self, requests: int, connections: int) -> None:
        self._left = requests
        every = max(1, requests // 200)
        await asyncio.gather(*(self._user(every) for _ in range(connections)))

    async def _user(self, every: int) -> None:
        connection = await Connection.open(self._server.port)
        while self._left > 0:
            self._left -= 1
            if self._left % every == 0:
                self.memory.append(self._server.memory)
            kind = self._rng.random()
            if kind < TOGGLE:
                await self._toggle(connection)
            elif kind < TOGGLE + HANG_UP:
                connection.send(self._request()[0])
                await asyncio.sleep(self._rng.random() * 0.05)
                connection.close()
                connection = await Connection.open(self._server.port)
                self.ends["hung up"] += 1
            else:
                short = kind < TOGGLE + HANG_UP + TOO_SHORT
                body, some, plan, compare = self._request()
                more = "X-Request-Timeout: 0.005\r\n" if short else ""
                self._check(await connection.ask(body, more=more), some, plan, compare, short)
        connection.close()

    def _request(self) -> tuple[bytes, list[int], int, bool]:
        some = self._rng.choices(range(len(self._texts)), k=self._rng.randrange(1, 5))
        plan, compare = self._rng.randrange(len(self._erase)), self._rng.random() < 0.2
        inputs = [self._texts[n] for n in some]
        body = {"inputs": inputs, "erase": self._erase[plan], "compare": compare, "activation": "none"}
        return json.dumps(body).encode(), some, plan, compare

    async def _toggle(self, connection: Connection) -> None:
        body = json.dumps({"tau": self._rng.choice([1, 2, 3]), "reason": "soak"}).encode()
        reply = await connection.ask(body, f"/v1/erasures/{self._rng.choice(CONCEPTS)}", "PUT")
        assert reply.status == 200, reply.body
        self.ends["toggled"] += 1

    def _check(self, reply: Reply, some: list[int], plan: int, compare: bool, short: bool) -> None:
        if reply.status == 504 and short:
            self.ends["too late"] += 1
            return
        if reply.status != 200:
            self.ends[f"status {reply.status}"] += 1
            return
        said = json.loads(reply.body)
        assert len(said["results"]) == len(some)
        worst = "answered"
        for text, result in zip(some, said["results"], strict=True):
            worst = max(worst, self._judge(result, text, plan), key=("answered", "near a bound", "wrong").index)
            bare = result["baseline"]
            if (bare is not None) != compare or (compare and self._judge(bare, text, 0) != "answered"):
                worst = "wrong"
        self.ends[worst] += 1

    def _judge(self, result: dict[str, Any], text: int, plan: int) -> str:
        expected, nearest = self._alone.logits(text, plan)
        names = self._alone._model.identity.labels
        scores = {each["label"]: each["score"] for each in result["scores"]}
        difference = float(np.abs(expected - np.array([scores[name] for name in names])).max())
        if difference <= TOLERANCE:
            self.largest = max(self.largest, difference)
            return "answered"
        return "near a bound" if nearest < NEAR else "wrong"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--model", choices=("tiny", "minilm"), default="tiny")
    parser.add_argument("--cache-dir", type=Path, default=Path("build/bench"))
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    path = small_model(asked.model, asked.cache_dir)
    model = load_model(str(path), device="cpu", name=NAME)
    fitted = fit(model, load_corpus(str(CORPUS / "train.jsonl"), labels=model.identity.labels), layers="all")
    rng = random.Random(0)
    texts, plans = random_texts(rng), [(), *(random_plan(rng) for _ in range(PLANS))]
    alone = Alone(model, fitted.range_set, texts, plans)
    started = time.monotonic()
    for plan in range(len(plans)):  # beforehand, so that the checks take no time in which answers wait
        for text in range(len(texts)):
            alone.logits(text, plan)
    print(f"{len(texts) * len(plans)} answers alone: {time.monotonic() - started:.0f} s", flush=True)
    with connect(None, asked.cache_dir / "redis") as client:
        store = RangeStore(client, NAME)
        store.activate(store.range_sets.publish(fitted.range_set, fitted.inspect), force=True)
        with serving(path, asked.cache_dir, "--threads", "1", name=NAME) as server:
            soak = Soak(server, alone, texts, plans)
            started = time.monotonic()
            asyncio.run(soak.run(asked.requests, asked.connections))
            seconds = time.monotonic() - started
            probe = asyncio.run(_ready(server.port))
    print(f"{asked.requests} requests in {seconds:.0f} s: " + ", ".join(f"{n} {end}" for end, n in soak.ends.items()))
    print(f"largest difference of a logit, bounds apart: {soak.largest:.1e} (≤ {TOLERANCE:.0e})")
    first, last = (float(np.median(part)) for part in (soak.memory[20:40], soak.memory[-20:]))
    print(
        f"memory of the server: {first / 1e6:.0f} MB after a tenth, {last / 1e6:.0f} MB at the end: {last / first:.3f}"
    )
    known = {"answered", "near a bound", "hung up", "too late", "toggled"}
    if not probe or set(soak.ends) - known or last > (1 + FLAT) * first:
        raise SystemExit("a wrong answer, an unknown end, or memory that grows")


async def _ready(port: int) -> bool:
    connection = await Connection.open(port)
    reply = await connection.ask(b"", "/readyz", "GET")
    connection.close()
    return reply.status == 200


if __name__ == "__main__":
    main()

"""Range sets on a real Redis: readers see them complete or not at all; old ones are removed unless active."""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import redis

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from range_store.domain.range_set import InspectLayer, RangeSet
from range_store.errors import (
    InvalidRangeSet,
    NotFitted,
    RangeSetInUse,
    RangeStoreError,
    UnknownRangeSet,
)
from range_store.storage.archive import read_archive
from range_store.storage.codec import describe, encode_metadata, encode_parts, serve_part
from range_store.storage.range_sets import KEPT, UNPUBLISHED_SECONDS
from range_store.storage.schema import PUT_PART, metadata_key, part_key
from range_store.storage.store import RangeStore
from tests.range_store.builders import random_range_set

Made = tuple[RangeSet, dict[int, InspectLayer]]


def small(seed: int) -> Made:
    return random_range_set(seed, hidden=2, n_layers=1, bins=1)


def keys_of(client: redis.Redis, id_: str) -> list[bytes]:
    return sorted(client.scan_iter(f"neuronlens:rangeset:{id_}:*"))


def test_published_range_set_is_read_unchanged(store: RangeStore) -> None:
    range_set, inspect = random_range_set(100)
    assert store.range_sets.publish(range_set, inspect) == range_set.id
    back = store.range_sets.read(range_set.id)
    assert (back.id, back.provenance) == (range_set.id, range_set.provenance)
    read = {layer: store.range_sets.read_inspect(range_set.id, layer) for layer in back.layers}
    assert describe(back.provenance, back.layers, read) == describe(range_set.provenance, range_set.layers, inspect)
    assert store.range_sets.provenance(range_set.id) == range_set.provenance
    with pytest.raises(NotFitted, match=r"layer 7 .* 0, 1, 2"):
        store.range_sets.read_inspect(range_set.id, 7)


@pytest.mark.parametrize("piece", [1000, 100_000])
def test_large_part_is_kept_in_pieces(store: RangeStore, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    range_set, inspect = random_range_set(190)
    lengths = describe(range_set.provenance, range_set.layers, inspect)[1]
    assert 1000 < max(lengths.values()) < 100_000
    whole = store.range_sets.publish(range_set, inspect)
    unsplit = len(keys_of(store.client, whole))
    store.range_sets.remove(whole)
    monkeypatch.setattr("range_store.storage.range_sets.PIECE_BYTES", piece)
    store.range_sets.publish(range_set, inspect)
    more = sum(-(-length // piece) - 1 for length in lengths.values())
    assert len(keys_of(store.client, whole)) == unsplit + more
    assert all(store.client.strlen(key) <= piece for key in keys_of(store.client, whole) if b":layer:" in key)
    assert all(store.client.ttl(key) == -1 for key in keys_of(store.client, whole)), "no piece expires"
    back = store.range_sets.read(whole)
    read = {layer: store.range_sets.read_inspect(whole, layer) for layer in back.layers}
    assert describe(back.provenance, back.layers, read) == describe(range_set.provenance, range_set.layers, inspect)
    store.range_sets.remove(whole)
    assert keys_of(store.client, whole) == []


def test_part_whose_length_is_that_of_a_piece_is_whole(store: RangeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    range_set, inspect = small(191)
    _, lengths = describe(range_set.provenance, range_set.layers, inspect)
    monkeypatch.setattr("range_store.storage.range_sets.PIECE_BYTES", max(lengths.values()))
    store.range_sets.publish(range_set, inspect)
    assert len(keys_of(store.client, range_set.id)) == len(lengths) + 2
    assert store.range_sets.read_inspect(range_set.id, 0).histogram.tolist() == inspect[0].histogram.tolist()


def test_lost_piece_is_found(store: RangeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("range_store.storage.range_sets.PIECE_BYTES", 1000)
    range_set, inspect = random_range_set(192)
    store.range_sets.publish(range_set, inspect)
    store.client.delete(part_key(range_set.id, "layer:1:inspect:1"))
    with pytest.raises(InvalidRangeSet, match=r"layer:1:inspect .* corrupt"):
        store.range_sets.read_inspect(range_set.id, 1)
    store.range_sets.publish(range_set, inspect)
    assert store.range_sets.read_inspect(range_set.id, 1).histogram.tolist() == inspect[1].histogram.tolist()


def test_part_from_before_there_were_pieces_is_read(store: RangeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    range_set, inspect = random_range_set(193)
    store.range_sets.publish(range_set, inspect)
    monkeypatch.setattr("range_store.storage.range_sets.PIECE_BYTES", 1000)
    assert store.range_sets.read_inspect(range_set.id, 1).histogram.tolist() == inspect[1].histogram.tolist()


def test_list_begins_with_the_newest_and_marks_the_active_one(store: RangeStore) -> None:
    assert store.range_sets.list() == ()
    ids = [store.range_sets.publish(*small(seed)) for seed in (101, 102, 103)]
    store.activate(ids[1])
    listed = store.range_sets.list()
    assert [(each.id, each.active) for each in listed] == [(ids[2], False), (ids[1], True), (ids[0], False)]
    assert listed[0].published_at > listed[1].published_at > listed[2].published_at


def test_publishing_again_makes_a_range_set_the_newest_and_changes_nothing_else(store: RangeStore) -> None:
    first, inspect = small(104)
    store.range_sets.publish(first, inspect)
    store.range_sets.publish(*small(105))
    before = {key: store.client.dump(key) for key in keys_of(store.client, first.id)}
    later = first.provenance.model_copy(update={"created_at": 1.0, "versions": {"numpy": "another"}})
    store.range_sets.publish(RangeSet(first.id, later, first.layers), inspect)
    assert next(each.id for each in store.range_sets.list()) == first.id
    assert {key: store.client.dump(key) for key in keys_of(store.client, first.id)} == before
    assert store.range_sets.provenance(first.id) == first.provenance


def test_unfinished_publication_is_invisible_and_expires(store: RangeStore) -> None:
    range_set, inspect = small(106)
    put = store.client.register_script(PUT_PART)
    for name, data in encode_parts(range_set.provenance, range_set.layers, inspect):
        put([part_key(range_set.id, name)], [data, UNPUBLISHED_SECONDS])
    meta, _ = describe(range_set.provenance, range_set.layers, inspect)
    put([metadata_key(range_set.id)], [encode_metadata(meta), UNPUBLISHED_SECONDS])
    assert store.range_sets.list() == ()
    for read in (store.range_sets.read, store.range_sets.provenance, store.activate, store.range_sets.remove):
        with pytest.raises(UnknownRangeSet):
            read(range_set.id)
    with pytest.raises(UnknownRangeSet):
        store.range_sets.read_inspect(range_set.id, 0)
    keys = keys_of(store.client, range_set.id)
    assert len(keys) == 3
    assert all(0 < store.client.ttl(key) <= UNPUBLISHED_SECONDS for key in keys)
    store.range_sets.publish(range_set, inspect)
    for name, data in encode_parts(range_set.provenance, range_set.layers, inspect):
        put([part_key(range_set.id, name)], [data, UNPUBLISHED_SECONDS])  # another publication of it is not finished
    assert {store.client.ttl(key) for key in keys_of(store.client, range_set.id)} == {-1}


def test_publication_with_a_missing_or_short_part_is_refused(store: RangeStore) -> None:
    range_set, inspect = small(107)
    key = part_key(range_set.id, serve_part(0))
    original = store.range_sets._put_part

    def put(keys: list[str], arguments: list[object]) -> object:
        return None if keys == [key] else original(keys, arguments)

    store.range_sets._put_part = put  # type: ignore[assignment]  # a publisher whose part does not arrive
    for present in (None, b"short"):
        if present:
            store.client.set(key, present)
        with pytest.raises(RangeStoreError, match="vanishes"):
            store.range_sets.publish(range_set, inspect)
        assert store.range_sets.list() == ()
    store.range_sets._put_part = original
    store.range_sets.publish(range_set, inspect)
    assert store.range_sets.read(range_set.id).id == range_set.id


def test_publishing_again_repairs_damaged_parts(store: RangeStore) -> None:
    range_set, inspect = random_range_set(108)
    store.range_sets.publish(range_set, inspect)
    key = part_key(range_set.id, serve_part(1))
    good = store.client.get(key)
    store.client.setrange(key, 200, b"\0\0\0\0")
    with pytest.raises(InvalidRangeSet, match=r"layer:1:serve.*corrupt"):
        store.range_sets.read(range_set.id)
    with pytest.raises(InvalidRangeSet):
        store.activate(range_set.id)
    store.range_sets.publish(range_set, inspect)
    assert (store.client.get(key), store.client.ttl(key)) == (good, -1)
    store.client.delete(key)
    with pytest.raises(InvalidRangeSet, match="lost its part 'layer:1:serve'"):
        store.range_sets.read(range_set.id)
    store.client.set(metadata_key(range_set.id), b"{}")
    with pytest.raises(InvalidRangeSet, match=range_set.id):
        store.range_sets.list()
    store.range_sets.publish(range_set, inspect)
    assert store.range_sets.read(range_set.id).id == range_set.id
    store.client.delete(metadata_key(range_set.id))
    for call in (store.range_sets.list, lambda: store.range_sets.read(range_set.id)):
        with pytest.raises(InvalidRangeSet, match="lost its part 'meta'"):
            call()
    store.range_sets.remove(range_set.id)
    assert store.range_sets.list() == ()


def test_last_ten_range_sets_and_the_active_one_are_kept(store: RangeStore) -> None:
    made = [small(200 + n) for n in range(KEPT + 4)]
    active = store.range_sets.publish(*made[0])
    store.activate(active)
    ids = [active, *(store.range_sets.publish(*each) for each in made[1:])]
    kept = [*reversed(ids[-KEPT:]), active]
    assert [each.id for each in store.range_sets.list()] == kept
    assert all(store.range_sets.read(each).id == each for each in kept)
    for removed in set(ids) - set(kept):
        assert keys_of(store.client, removed) == []
        with pytest.raises(UnknownRangeSet):
            store.activate(removed)
    store.activate(ids[-1])
    store.range_sets.publish(*made[-1])
    assert active not in [each.id for each in store.range_sets.list()], "no longer active, and not among the last ten"


def test_nothing_is_removed_while_the_live_state_is_unreadable(store: RangeStore) -> None:
    made = [small(300 + n) for n in range(KEPT + 1)]
    first = store.range_sets.publish(*made[0])
    store.client.set(store.keys.live, b"not JSON")
    for each in made[1:]:
        store.range_sets.publish(*each)
    assert store.range_sets.read(first).id == first
    with pytest.raises(RangeSetInUse):
        store.range_sets.remove(first)


def test_active_range_set_cannot_be_removed(store: RangeStore) -> None:
    first, second = (store.range_sets.publish(*small(seed)) for seed in (109, 110))
    store.activate(first)
    with pytest.raises(RangeSetInUse, match="activate another"):
        store.range_sets.remove(first)
    store.range_sets.remove(second)
    assert [each.id for each in store.range_sets.list()] == [first]
    assert keys_of(store.client, second) == []
    with pytest.raises(UnknownRangeSet, match=second):
        store.range_sets.remove(second)


def test_models_share_a_range_set_until_the_last_removes_it(store: RangeStore) -> None:
    other = RangeStore(store.client, f"{store.model}-other")
    range_set, inspect = small(111)
    for each in (store, other):
        each.range_sets.publish(range_set, inspect)
    store.range_sets.remove(range_set.id)
    assert other.range_sets.read(range_set.id).id == range_set.id
    with pytest.raises(UnknownRangeSet):
        store.range_sets.read(range_set.id)
    other.range_sets.remove(range_set.id)
    assert keys_of(store.client, range_set.id) == []


def test_range_set_whose_id_does_not_fit_its_contents_is_not_published(store: RangeStore) -> None:
    range_set, inspect = small(112)
    with pytest.raises(InvalidRangeSet, match="altered"):
        store.range_sets.publish(RangeSet("0" * 20, range_set.provenance, range_set.layers), inspect)
    wrong = dataclasses.replace(range_set.layers[0], std=-1 - range_set.layers[0].std)
    with pytest.raises(InvalidRangeSet, match="negative"):
        store.range_sets.publish(RangeSet(range_set.id, range_set.provenance, {0: wrong}), inspect)
    assert store.range_sets.list() == ()


def test_range_set_is_exported_and_imported_as_one_file(store: RangeStore, tmp_path: Path) -> None:
    range_set, inspect = random_range_set(113)
    store.range_sets.publish(range_set, inspect)
    store.range_sets.export_file(range_set.id, tmp_path / "ranges.safetensors")
    store.range_sets.remove(range_set.id)
    assert store.range_sets.publish(*read_archive(tmp_path / "ranges.safetensors")) == range_set.id
    assert np.array_equal(store.range_sets.read(range_set.id).layers[2].std, range_set.layers[2].std)
    with pytest.raises(UnknownRangeSet):
        store.range_sets.export_file("0" * 20, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()
    with pytest.raises(InvalidRangeSet, match="absent"):
        store.range_sets.publish(*read_archive(tmp_path / "absent"))


def test_readers_see_complete_range_sets_while_others_publish_and_remove(
    store: RangeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment a listed range set can be read completely or is unknown; it is never there in part.

    A publisher tries again when somebody removes the very range set meanwhile; the others remove 45 times each.
    """
    monkeypatch.setattr("range_store.storage.range_sets.ATTEMPTS", 100)
    made = [small(400 + n) for n in range(4)]
    stop = threading.Event()
    wrong: list[BaseException] = []

    def churn(mine: list[Made]) -> None:
        for _ in range(15):
            for range_set, inspect in mine:
                try:
                    store.range_sets.publish(range_set, inspect)
                    store.range_sets.remove(range_set.id)
                except UnknownRangeSet:
                    pass
                except BaseException as error:
                    wrong.append(error)
        stop.set()

    def read() -> None:
        while not stop.is_set():
            try:
                for each in store.range_sets.list():
                    store.range_sets.read(each.id)
                    store.range_sets.read_inspect(each.id, 0)
            except UnknownRangeSet:
                pass
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=churn, args=(mine,)) for mine in (made[:3], made[1:])]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_active_range_set_is_complete_while_new_ones_replace_old_ones(store: RangeStore) -> None:
    """Activating an old range set and removing it to make room for a new one exclude each other.

    One is active from the start, because the publisher may remove all others before the first activation.
    """
    made = [small(500 + n) for n in range(2 * KEPT)]
    ids = [store.range_sets.publish(*each) for each in made[:KEPT]]
    store.activate(ids[0])
    publisher = threading.Thread(target=lambda: [store.range_sets.publish(*each) for each in made[KEPT:]])
    publisher.start()
    for id_ in ids * 3:
        try:
            store.activate(id_)
        except UnknownRangeSet:
            continue
        assert store.range_sets.read(id_).id == id_
        store.set_erasures([LiveErasure(erasure=Erasure(concept="World", layers=(0,), top_fraction=1.0))])
    publisher.join()
    active = store.live_state().range_set
    assert active is not None
    assert store.range_sets.read(active).id == active

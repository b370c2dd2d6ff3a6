"""Tests of a resume within an epoch with other ranks, batch sizes or loader processes: each image is used once."""

import hashlib
import json
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spar_lightning.datamodules.dataloader import ResumableLoader
from spar_lightning.datamodules.packed_sampler import PackOrder
from spar_lightning.datamodules.samplers import EpochOrder, ResumeError, StreamOrder

KINDS = ["shuffled", "streamed", "packed"]
RELEASED = {"shuffled": "3f3965c980b9786a", "streamed": "d14bb7edc1788dc0", "packed": "f35ddcc4a4eba2b0"}
World = tuple[int, int, int]  # ranks; batch size, or tokens of a pack in units of 20; loader processes
State = dict[str, Any]
Batches = list[list[int]]

kinds = st.sampled_from(KINDS)
lengths = st.integers(30, 70)
worlds = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
legs = st.lists(st.tuples(worlds, st.integers(0, 8)), min_size=1, max_size=4)
epochs = st.integers(0, 2)


def order(kind: str, length: int, world: World, rank: int = 0) -> EpochOrder:
    """Return an order over samples with random access, over uneven shards, or over images of 1 to 9 tokens."""
    ranks, size, workers = world
    if kind == "packed":
        return PackOrder(np.arange(length) * 7 % 9 + 1, 20 * size, rank, ranks, seed=3)
    if kind == "streamed":
        return StreamOrder(np.minimum(np.arange(length) // 7, 3), size, rank, ranks, 3, workers)
    return EpochOrder(length, size, rank, ranks, seed=3)


def loaders(kind: str, length: int, world: World, epoch: int, state: State | None = None) -> list[ResumableLoader]:
    """Return the loaders of all ranks at the start of an epoch or at a saved position."""
    found = []
    for rank in range(world[0]):
        loader = ResumableLoader(range(length), order(kind, length, world, rank), 0)  # type: ignore[arg-type]
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        loader.set_epoch(epoch)
        found.append(loader)
    return found


def train(ranks: list[ResumableLoader], steps: int | None = None) -> tuple[list[Batches], State]:
    """Return the batches of all ranks in the next steps, or in all steps that are left, and the state after them."""
    taken: list[Batches] = [[] for _ in ranks]
    for loader, batches in zip(ranks, taken, strict=True):
        left = len(loader) - loader.order.finished
        iterator = iter(loader)
        batches += [next(iterator) for _ in range(left if steps is None else min(steps, left))]
        assert steps is not None or next(iterator, None) is None  # the length is that of the iteration
    states = [loader.state_dict() for loader in ranks]
    assert all(state == states[0] for state in states)  # Lightning saves that of rank 0
    return taken, states[0]


def run(kind: str, length: int, epoch: int, plan: list[tuple[World, int]]) -> tuple[list[int], State | None]:
    """Train some steps with each world; return the images seen by all ranks and the last state."""
    seen, state = list[int](), None
    for world, steps in plan:
        taken, state = train(loaders(kind, length, world, epoch, state), steps)
        seen += chain(*chain(*taken))
    return seen, state


@settings(deadline=None, max_examples=40)
@given(kinds, lengths, epochs, legs, worlds)
def test_each_image_is_used_once(
    kind: str, length: int, epoch: int, plan: list[tuple[World, int]], last: World
) -> None:
    seen, state = run(kind, length, epoch, plan)
    missing = length - len(seen)
    rest, state = train(loaders(kind, length, last, epoch, state))
    assert len({len(batches) for batches in rest}) == 1
    seen += chain(*chain(*rest))
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(length))
    ranks, size, _ = last
    dropped = length - len(seen)
    assert dropped < (ranks if kind == "packed" else ranks * size)
    if kind == "packed" and missing % ranks == 0:
        assert dropped == 0
    assert sum(leg["steps"] for leg in state["legs"]) == len(loaders(kind, length, last, epoch, state)[0])


@settings(deadline=None, max_examples=40)
@given(kinds, lengths, epochs, legs, worlds, st.integers(1, 9), st.integers(0, 9))
def test_the_same_world_continues_with_the_same_batches(
    kind: str, length: int, epoch: int, plan: list[tuple[World, int]], world: World, first: int, second: int
) -> None:
    _, state = run(kind, length, epoch, plan)
    whole, _ = train(loaders(kind, length, world, epoch, state))
    taken, state = train(loaders(kind, length, world, epoch, state), first)
    for steps in (second, None):
        more, state = train(loaders(kind, length, world, epoch, state), steps)
        taken = [a + b for a, b in zip(taken, more, strict=True)]
    assert taken == whole
    # Epochs after it are those of a run without a resume.
    resumed, fresh = (loaders(kind, length, world, epoch + 1, given) for given in (state, None))
    assert train(resumed)[0] == train(fresh)[0]


@settings(deadline=None, max_examples=40)
@given(lengths, epochs, legs, worlds)
def test_loader_processes_read_forward(length: int, epoch: int, plan: list[tuple[World, int]], world: World) -> None:
    _, state = run("streamed", length, epoch, plan)
    ranks = loaders("streamed", length, world, epoch, state)
    place = np.argsort(ranks[0].order.sequence())  # shards are contiguous in it
    started = ranks[0].order.position.start
    for batches in train(ranks)[0]:
        workers = max(world[2], 1)
        for worker in range(workers):
            places = place[list(chain(*batches[worker::workers]))]
            assert started or all(a < b for a, b in pairwise(places))


@settings(deadline=None, max_examples=40)
@given(lengths, legs, worlds)
def test_packs_of_the_rest_are_within_the_limit(length: int, plan: list[tuple[World, int]], world: World) -> None:
    _, state = run("packed", length, 0, plan)
    ranks = loaders("packed", length, world, 0, state)
    assert isinstance(ranks[0].order, PackOrder)
    tokens = ranks[0].order.tokens
    assert all(len(pack) and tokens[pack].sum() <= 20 * world[1] for pack in chain(*train(ranks)[0]))


def test_images_that_cannot_be_packed_evenly_are_dropped() -> None:
    """Four ranks can use only 4 of 5 images that each fill a pack."""
    tokens = np.full(6, 9)
    loader = ResumableLoader(range(6), PackOrder(tokens, 10, 0, 1, 0), 0)  # type: ignore[arg-type]
    seen = [next(iter(loader))]
    for rank in range(4):
        other = PackOrder(np.full(6, 9), 10, rank, 2, 0)
        other.world_size = 4  # a new run with 4 ranks is rejected
        other.resume(loader.state_dict())
        assert len(other) == 2
        seen += other
    assert len(set(chain(*seen))) == 5 and all(len(pack) == 1 for pack in seen)


@given(kinds, lengths, legs, worlds, st.floats(0.1, 1), st.integers(1, 80))
@settings(deadline=None, max_examples=40)
def test_limit_train_batches(
    kind: str, length: int, plan: list[tuple[World, int]], world: World, fraction: float, most: int
) -> None:
    fresh = order(kind, length, world)
    assert fresh.count(1.0) == fresh.count() == len(fresh) and fresh.count(fraction) == int(len(fresh) * fraction)
    _, state = run(kind, length, 0, plan)
    fresh.resume(json.loads(json.dumps(state)))
    assert fresh.count(1.0) == fresh.count()
    assert fresh.finished <= fresh.count(fraction) <= fresh.count()
    assert fresh.count(most) == max(fresh.finished, min(most, fresh.count()))


def test_the_fraction_of_an_epoch_is_one_of_its_images() -> None:
    half = EpochOrder(400, 1, 0, 4, 0)
    half.resume({"epoch": 0, "order": half.identity(), "legs": [{"ranks": 2, "batch_size": 1, "steps": 40}]})
    assert half.count(0.5) == 40 + 30  # 80 images, then 120


def old(kind: str, length: int, ranks: int, size: int, workers: int, steps: int) -> State:
    """Return a loader state of version 0.1."""
    samples = ranks if kind == "packed" else ranks * size
    saved = {"images": length, "content": "", "samples_per_step": samples, "seed": 3}
    more = {"packed": {"pack_tokens": 20 * size}, "streamed": {"workers": max(workers, 1)}, "shuffled": {}}[kind]
    return {"epoch": 1, "consumed": steps * samples, "order": {**saved, **more}}


@settings(deadline=None, max_examples=40)
@given(kinds, lengths, worlds, st.integers(0, 9))
def test_a_checkpoint_of_version_0_1_continues(kind: str, length: int, world: World, steps: int) -> None:
    whole, _ = train(loaders(kind, length, world, 1))
    state = old(kind, length, *world, min(steps, len(whole[0])))
    rest, _ = train(loaders(kind, length, world, 1, state))
    assert rest == [batches[min(steps, len(whole[0])) :] for batches in whole]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_version_0_1_with_another_world(kind: str) -> None:
    state = old(kind, 40, 4, 1, 2, 3)
    two = loaders(kind, 40, (2, 1, 2), 1, state)
    if kind != "shuffled":
        with pytest.raises(ResumeError, match=r"epoch 1: .*samples_per_step 4 instead of 2.*epoch\.ckpt"):
            train(two)
        return
    done = [batch for rank in range(4) for batch in list(loaders(kind, 40, (4, 1, 0), 1)[rank])[:3]]
    taken, state = train(two, 5)
    again, _ = train(loaders(kind, 40, (3, 1, 0), 1, state))
    seen = [*chain(*done), *chain(*chain(*taken)), *chain(*chain(*again))]
    assert len(set(seen)) == len(seen) == 12 + 10 + 18


@pytest.mark.parametrize("kind", KINDS)
def test_orders_are_those_of_version_0_1(kind: str) -> None:
    """A change would break the resume of existing checkpoints within an epoch; the hashes are of released code."""
    digest = hashlib.sha256()
    for world in ((1, 1, 0), (2, 2, 2), (3, 1, 3)):
        for epoch in range(2):
            digest.update(json.dumps(train(loaders(kind, 61, world, epoch))[0]).encode())
    assert digest.hexdigest()[:16] == RELEASED[kind]


@pytest.mark.parametrize(
    ("kind", "change", "rows"),
    [
        ("shuffled", {"content": "a"}, r"content a instead of "),
        ("shuffled", {"images": 41, "seed": 4}, r"images 41 instead of 40, seed 4 instead of 3"),
        ("shuffled", {"kind": "packed"}, r"kind packed instead of shuffled"),
        ("streamed", {"shards": "a"}, r"shards a instead of [0-9a-f]{16}"),
        ("packed", {"tokens": "a"}, r"tokens a instead of [0-9a-f]{16}"),
    ],
)
def test_another_order_is_rejected_within_an_epoch(kind: str, change: State, rows: str) -> None:
    _, state = train(loaders(kind, 40, (1, 1, 0), 1), 2)
    state["order"] |= change
    for world in ((1, 1, 0), (2, 1, 0)):
        with pytest.raises(ResumeError, match=rf"epoch 1: .*\({rows}\).*data\.batch_size.*epoch\.ckpt"):
            next(iter(loaders(kind, 40, world, 1, state)[0]))
        assert len(list(loaders(kind, 40, world, 2, state)[0])) == len(order(kind, 40, world))


def test_a_state_is_kept_until_training_continues() -> None:
    """A resumed run may save before its first step, for example before a validation."""
    _, state = train(loaders("shuffled", 40, (4, 1, 0), 1), 3)
    (waiting,) = loaders("shuffled", 40, (1, 1, 0), 1, state)
    assert waiting.state_dict() == state
    assert len(waiting) == 3 + 28 and len(list(waiting)) == 28

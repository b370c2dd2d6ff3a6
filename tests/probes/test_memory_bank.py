"""Tests of the memory bank: exact search, soft labels, class counts of patches, balanced samples."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.probes import memory_bank
from spar_lightning.probes.memory_bank import MemoryBank, balanced, class_counts


def filled(features: torch.Tensor, counts: torch.Tensor) -> MemoryBank:
    """Return a bank with some space left, filled in two steps."""
    bank = MemoryBank(len(features) + 5, features.shape[1], counts.shape[1])
    half = len(features) // 2
    bank.add(features[:half], counts[:half])
    bank.add(features[half:], counts[half:])
    return bank


@settings(max_examples=60, deadline=None)
@given(
    patches=st.integers(1, 90),
    queries=st.integers(1, 9),
    width=st.integers(4, 12),
    classes=st.integers(1, 5),
    block=st.integers(1, 40),
    k=st.integers(1, 30),
    seed=st.integers(0, 2**20),
)
def test_labels_equal_those_of_brute_force(
    patches: int, queries: int, width: int, classes: int, block: int, k: int, seed: int
) -> None:
    k = min(k, patches)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(patches, width, generator=generator)
    counts = torch.randint(0, 65, (patches, classes), generator=generator)
    counts[torch.arange(patches), torch.randint(classes, (patches,), generator=generator)] += 1
    asked = 3 * torch.randn(queries, width, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_bank, "BLOCK", block)
        patch.setattr(memory_bank, "QUERIES", 4)
        bank = filled(features, counts)
        similarities, _ = bank.nearest(asked, k)
        found = bank.label(asked, k, 0.02)

    stored = bank._features[:patches].double().numpy()
    lengths = np.linalg.norm(stored, axis=1)
    np.testing.assert_allclose(stored, features.numpy() / np.linalg.norm(features.numpy(), axis=1)[:, None], atol=5e-4)
    assert abs(lengths - 1).max() < 1e-3  # fp16 has 11 bits
    unit = asked.double().numpy() / np.linalg.norm(asked.double().numpy(), axis=1, keepdims=True)
    cosines = unit @ stored.T
    order = np.argsort(-cosines, axis=1)
    ranked = np.take_along_axis(cosines, order, axis=1)
    assume(k == patches or (ranked[:, k - 1] - ranked[:, k]).min() > 1e-6)  # otherwise either may be the k-th
    nearest = ranked[:, :k]
    np.testing.assert_allclose(similarities.numpy(), nearest, atol=1e-6)
    exponent = np.exp((nearest - nearest[:, :1]) / 0.02)
    weights = exponent / exponent.sum(1, keepdims=True)
    shares = counts.numpy() / counts.numpy().sum(1, keepdims=True)
    np.testing.assert_allclose(found.numpy(), (weights[:, :, None] * shares[order[:, :k]]).sum(1), atol=1e-4)


def test_classes_of_patches_are_counted() -> None:
    labels = torch.tensor([[0, 0, 1, 1, 2, 2], [0, IGNORED, 1, 1, 2, 0]], dtype=torch.int16)
    assert class_counts(labels, (1, 3), 2, 3).tolist() == [[3, 0, 0], [0, 4, 0], [1, 0, 3]]


def test_labels_are_resized_with_the_image() -> None:
    """An image of 10 x 14 pixels becomes 8 x 16 for patches of 8 pixels."""
    labels = torch.zeros(10, 14, dtype=torch.int16)
    labels[:, 7:] = 1
    assert class_counts(labels, (1, 2), 8, 2).tolist() == [[64, 0], [0, 64]]


def test_unlabeled_patches_have_no_counts() -> None:
    assert class_counts(torch.full((4, 4), IGNORED), (2, 2), 2, 3).sum() == 0


def test_a_balanced_sample_prefers_patches_with_rare_classes() -> None:
    """One patch of class 1 among 99 of class 0: its score is at most 1, those of the others are uniform below 99."""
    counts = torch.zeros(100, 2, dtype=torch.long)
    counts[:, 0] = 4
    counts[17] = torch.tensor([0, 4])
    drawn = [balanced(counts, 10, torch.Generator().manual_seed(seed)).tolist() for seed in range(200)]
    assert all(len(set(indices)) == 10 for indices in drawn)
    share = sum(17 in indices for indices in drawn) / len(drawn)
    others = sum(len(indices) for indices in drawn) / len(drawn) / 100
    assert share > 0.95 > 5 * others
    assert balanced(counts, 1000, torch.Generator()).sort().values.tolist() == list(range(100))


def test_the_score_of_a_patch_is_that_of_all_its_classes() -> None:
    """A patch with both classes counts both frequencies, so it is never preferred to a pure one at equal random."""
    counts = torch.tensor([[4, 0], [4, 4], [0, 4]])
    generator = torch.Generator().manual_seed(3)
    random = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = (torch.tensor([2.0, 4.0, 2.0], dtype=torch.float64) * random).argsort().tolist()
    assert balanced(counts, 3, generator).tolist() == expected


def test_size_in_bytes() -> None:
    bank = MemoryBank(10, 8, 3)
    stored = sum(t.numel() * t.element_size() for t in vars(bank).values() if isinstance(t, torch.Tensor))
    assert MemoryBank.bytes_of(10, 8, 3) == stored


def test_autocast_does_not_change_the_search() -> None:
    bank = filled(torch.randn(300, 16), torch.ones(300, 2, dtype=torch.long))
    queries = torch.randn(20, 16)
    plain = bank.nearest(queries, 30)
    with torch.autocast("cpu", torch.bfloat16):
        cast = bank.nearest(queries, 30)
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))

"""Label maps in chunks of names equal the whole-tensor computation."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spar_lightning.backbones import Tiny
from spar_lightning.zero_shot import TextClassifier, embed_names


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_chunks_change_nothing(names: int, h: int, w: int, height: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(names)
    text = F.normalize(torch.randn(names, 7, generator=generator), dim=-1)
    owner = torch.randint(0, max(1, names - 2), (names,), generator=generator)
    features = torch.randn(h, w, 7, generator=generator)
    classifier = TextClassifier(("a",) * names, text, owner)
    size = (height, 2 * height + 1)
    cosines = torch.einsum("hwd,qd->qhw", F.normalize(features, dim=-1), text)
    scores = F.interpolate(cosines[None], size, mode="bilinear", align_corners=False)[0]
    by_class = torch.stack(
        [scores[owner == c].amax(0) if (owner == c).any() else torch.full(size, -9.0) for c in range(names)]
    )
    assert torch.equal(classifier.label_map(features, size, chunk), by_class.argmax(0))


def test_several_names_belong_to_one_class() -> None:
    classifier = TextClassifier.from_classes(Tiny().encode_text, {"round": ["disc", "ring"], "bar": ["bar"]})
    assert classifier.labels == ("round", "bar")
    assert classifier.owner.tolist() == [0, 0, 1]


def test_templates_are_averaged_unit_vectors() -> None:
    tiny = Tiny()
    one, two = (embed_names(tiny.encode_text, ["disc"], [t])[0] for t in ("{}", "a photo of a {}."))
    both = embed_names(tiny.encode_text, ["disc"], ["{}", "a photo of a {}."])[0]
    torch.testing.assert_close(both, F.normalize(one + two, dim=0))

"""Prototypes that learn: their start, their clusters, several classes, and the alignment."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distillfss_core.nn.backbones import load_backbone
from distillfss_core.nn.decoder import SlimDecoder
from distillfss_core.nn.features import EncodedSupport, FeaturePyramid, class_masks, merge_classes
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.nn.losses import map_loss, segmentation_loss
from distillfss_core.nn.teachers import AlignmentSettings, AlignmentTeacher, DcamaTeacher, PrototypeTeacher
from distillfss_core.nn.teachers.alignment import class_prototypes
from distillfss_core.types import IGNORE
from pyramids import SMALL_SPEC, random_pyramid


def _teacher(prototypes: int = 5) -> AlignmentTeacher:
    torch.manual_seed(0)
    decoder = SlimDecoder(SMALL_SPEC.coarse_blocks, SMALL_SPEC.skip_channels, width=8)
    return AlignmentTeacher(SMALL_SPEC, decoder, AlignmentSettings(prototypes=prototypes)).eval()


def _marked(labels: Tensor, seed: int = 1, noise: float = 0.5) -> FeaturePyramid:
    """Features in which each class is a direction of its own, with noise."""
    masks = torch.stack([(labels == c).float() for c in range(int(labels.max()) + 1)], 1)

    def mark(block: Tensor) -> Tensor:
        shares = F.adaptive_avg_pool2d(masks, block.shape[-2:])
        generator = torch.Generator().manual_seed(block.shape[1])
        directions = torch.randn(masks.shape[1], block.shape[1], generator=generator)
        return noise * block + torch.einsum("nkhw,kc->nchw", shares, directions)

    return random_pyramid(labels.shape[-1], len(labels), seed).map(mark)


def _labels(images: int, classes: int = 1, seed: int = 0) -> Tensor:
    labels = torch.randint(0, classes + 1, (images, 4, 4), generator=torch.Generator().manual_seed(seed))
    return labels.repeat_interleave(16, 1).repeat_interleave(16, 2).byte()


@pytest.mark.parametrize("classes", [1, 3])
def test_it_begins_with_the_maps_of_the_teacher_without_parameters(classes: int) -> None:
    labels = _labels(3, classes)
    support, query = EncodedSupport.of(_marked(labels), labels, classes), _marked(_labels(2, classes, 5), 2)
    learned, plain = _teacher(), PrototypeTeacher()
    with torch.no_grad():
        found = learned(query, learned.encode(support)).coarse
        expected = plain(query, plain.encode(support)).coarse
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_prototypes_are_the_masked_average_and_the_centers_of_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(3, 16, generator=generator), dim=1)
    tokens = F.normalize(centers.repeat(20, 1) + 0.02 * torch.randn(60, 16, generator=generator), dim=1)
    shares = torch.zeros(60, 2)
    shares[:, 1] = 1
    background, object_ = class_prototypes(tokens, shares, 4)
    assert not background.any()
    torch.testing.assert_close(object_[0], F.normalize(tokens.mean(0), dim=0))
    assert float((object_[1:] @ centers.T).amax(0).min()) > 0.99  # every cluster has its center
    again = class_prototypes(tokens, shares, 4)
    assert torch.equal(again[1], object_)


def test_classes_are_told_from_one_another_at_once() -> None:
    labels, asked = _labels(3, 3), _labels(1, 3, 7)
    teacher = _teacher()
    with torch.no_grad():
        keys = teacher.encode(EncodedSupport.of(_marked(labels), labels, 3))
        maps = teacher.coarse(_marked(asked, 2), keys).fine[0].mean(1)  # k h w
    truth = asked[0, ::8, ::8]
    labeled = torch.cat([torch.full_like(maps[:1], 0.5), maps]).argmax(0)
    assert float((labeled == truth).float().mean()) > 0.9


def test_the_alignment_is_small_where_the_queries_are_labeled_well_and_large_where_not() -> None:
    labels, asked = _labels(3), _labels(2, 1, 5)
    support, query = EncodedSupport.of(_marked(labels), labels, 1), _marked(asked, 2)
    teacher = _teacher()
    with torch.no_grad():
        right = teacher.alignment(query, asked.long(), support)
        wrong = teacher.alignment(query, 1 - asked.long(), support)
        nothing = teacher.alignment(query, torch.zeros_like(asked).long(), support)
    assert right is not None
    assert wrong is not None
    assert float(right) < 0.3 < 1.0 < float(wrong)
    assert float(nothing) == 0


def test_the_alignment_is_the_loss_of_the_support_as_a_query() -> None:
    labels, asked = _labels(2), _labels(2, 1, 5)
    labels[:, :16] = IGNORE
    support, query = (
        EncodedSupport.of(_marked(labels.where(labels != IGNORE, 0), noise=2.0), labels, 1),
        _marked(asked, 2, noise=2.0),
    )
    teacher = _teacher()
    aligned = teacher.alignment(query, asked.long(), support)
    swapped = EncodedSupport(query, class_masks(asked, 1), torch.ones(2, 64, 64))
    expected = map_loss(teacher.coarse(support.features, teacher.encode(swapped)), labels.long(), torch.tensor([True]))
    assert torch.equal(aligned, expected)
    aligned.backward()
    assert all(linear.weight.grad.abs().sum() > 0 for linear in teacher.project)


def test_labels_of_a_support_are_those_it_was_made_from() -> None:
    labels = torch.tensor([[[0, 1, 2], [IGNORE, 3, 0]]], dtype=torch.uint8)
    assert torch.equal(EncodedSupport.of(random_pyramid(32), labels, 3).labels, labels.long())


def test_other_teachers_have_no_alignment() -> None:
    head = FewShotHead(load_backbone("resnet18", "random").spec, 1, HeadForm("default", "default", "default", 8))
    assert isinstance(head.teacher, DcamaTeacher)
    labels = _labels(1)
    support = EncodedSupport.of(random_pyramid(64), labels, 1)
    assert head.teacher.alignment(random_pyramid(64), labels.long(), support) is None


def test_learning_moves_projections_and_gains_and_the_episode_is_learned() -> None:
    labels, asked = _labels(2), _labels(2, 1, 5)
    support, query = EncodedSupport.of(_marked(labels, noise=2.0), labels, 1), _marked(asked, 2, noise=2.0)
    teacher = _teacher().train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        found = teacher(query, teacher.encode(support))
        logits = merge_classes(found.logits)
        aligned = teacher.alignment(query, logits.argmax(1), support)
        assert aligned is not None
        loss = segmentation_loss(logits, asked.long()) + 0.3 * aligned
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    now = teacher.state_dict()
    moved = {name.partition(".")[0] for name, value in now.items() if not torch.equal(value, before[name])}
    assert moved == {"project", "evidence", "decoder"}

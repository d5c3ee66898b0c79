"""UINO: signed correlations, their readers, the selective scan, and the teacher they make."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distillfss_core.errors import SettingsError
from distillfss_core.nn.backbones import Backbone, load_backbone
from distillfss_core.nn.decoder import SlimDecoder
from distillfss_core.nn.features import EncodedSupport, FeaturePyramid, merge_classes
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.nn.losses import map_loss, segmentation_loss
from distillfss_core.nn.teachers import UinoSettings, UinoTeacher
from distillfss_core.nn.teachers.correlation import Queries, Shot, Sides, hypercorrelation, unit_tokens
from distillfss_core.nn.teachers.readers import READERS
from distillfss_core.nn.teachers.scan import SelectiveScan, selective_scan
from distillfss_core.nn.teachers.uino import BottleneckAdapter
from distillfss_core.settings import READERS as READERS_OF_SETTINGS
from distillfss_core.types import IGNORE
from pictures import blobs
from pyramids import SMALL_SPEC, random_pyramid


def _teacher(reader: str = "pool", *, trained: bool = False, **settings) -> UinoTeacher:
    """A small teacher; ``trained`` puts random numbers where a new one has zeros."""
    torch.manual_seed(0)
    decoder = SlimDecoder(SMALL_SPEC.coarse_blocks, SMALL_SPEC.skip_channels, width=8)
    made = UinoTeacher(SMALL_SPEC, decoder, UinoSettings(reader=reader, width=16, heads=2, **settings)).eval()
    if trained:
        with torch.no_grad():
            for parameter in (*made.dense.parameters(), *made.masks.parameters()):
                parameter.normal_(std=0.3)
    return made


def _support(shots: int, classes: int = 1, side: int = 64) -> EncodedSupport:
    labels = torch.randint(0, classes + 1, (shots, side // 8, side // 8), generator=torch.Generator().manual_seed(1))
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2).byte()
    return EncodedSupport.of(random_pyramid(side, shots, 1), labels, classes)


def _logits(teacher: UinoTeacher, query: FeaturePyramid, support: EncodedSupport) -> Tensor:
    with torch.no_grad():
        return teacher(query, teacher.encode(support)).logits


def test_settings_name_the_readers_there_are() -> None:
    assert tuple(READERS) == READERS_OF_SETTINGS


# shapes


@pytest.fixture(scope="module", params=["efficientnet_lite0", "resnet18", "dinov2_small", "swin_base_384"])
def backbone(request) -> Backbone:
    return load_backbone(request.param, "random")


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "shots", "classes"), [(1, 1, 1), (2, 5, 2)])
def test_any_backbone_and_any_size_give_maps_in_0_to_1_and_logits_of_the_query_size(
    backbone, queries: int, shots: int, classes: int
) -> None:
    head = FewShotHead(backbone.spec, classes, HeadForm("default", "default", "uino", 8)).eval()
    with torch.no_grad():
        support = backbone(torch.rand(shots, 3, 75, 61))
        labels = torch.randint(0, classes + 1, (shots, *support.size), dtype=torch.uint8)
        query = backbone(torch.rand(queries, 3, 101, 67))
        found = head.teacher(query, head.teacher.encode(EncodedSupport.of(support, labels, classes)))
    assert found.logits.shape == (queries, classes, 2, *query.size)
    for maps, blocks in zip(found.coarse, query.coarse, strict=True):
        assert maps.shape == (queries, classes, len(blocks), *blocks[0].shape[-2:])
        assert 0 <= float(maps.min()) < float(maps.max()) <= 1


def test_the_adapter_of_the_published_size_has_the_published_number_of_parameters() -> None:
    adapter = BottleneckAdapter(768, 256, 8)
    assert sum(p.numel() for p in adapter.parameters()) == pytest.approx(1.25e6, rel=0.01)
    with torch.no_grad():
        assert adapter(torch.rand(1, 768, 5, 7)).shape == (1, 256, 5, 7)


# shots


@pytest.mark.parametrize("reader", READERS)
def test_the_order_of_shots_does_not_matter_to_a_trained_teacher(reader: str) -> None:
    teacher, query, support = _teacher(reader, trained=True), random_pyramid(64), _support(5)
    shuffled = support[torch.tensor([3, 0, 4, 2, 1])]
    torch.testing.assert_close(
        _logits(teacher, query, support), _logits(teacher, query, shuffled), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("reader", READERS)
def test_a_shot_that_is_repeated_counts_once(reader: str) -> None:
    teacher, query, support = _teacher(reader, trained=True), random_pyramid(64), _support(1)
    once = _logits(teacher, query, support)
    again = _logits(teacher, query, support[torch.zeros(4, dtype=torch.long)])
    torch.testing.assert_close(once, again, atol=1e-5, rtol=1e-5)
    other = _logits(teacher, query, _support(4))
    assert float((once - other).abs().max()) > 1e-3


@pytest.mark.parametrize("reader", READERS)
def test_classes_share_one_correlation_and_differ_in_signs(reader: str, monkeypatch) -> None:
    calls = []

    def counted(queries: Queries, shot: Shot) -> Tensor:
        calls.append(1)
        return hypercorrelation(queries, shot)

    monkeypatch.setattr("distillfss_core.nn.teachers.readers.hypercorrelation", counted)
    teacher, query, support = _teacher(reader, trained=True), random_pyramid(64), _support(2, classes=3)
    with torch.no_grad():
        together = teacher.dense_prompt(query, teacher.encode(support))
        assert len(calls) == (0 if reader == "attention" else 2)  # one a shot, or none at all
        if reader != "attention":  # which weighs background and classes
            for k in range(3):
                alone = EncodedSupport(support.features, support.masks[:, k : k + 1], support.valid)
                single = teacher.dense_prompt(query, teacher.encode(alone))
                torch.testing.assert_close(together[:, k], single[:, 0], atol=1e-5, rtol=1e-5)


# signs


def test_mask_and_complement_change_the_sign_of_every_position_exactly() -> None:
    support = _support(3)
    other = EncodedSupport(support.features, 1 - support.masks, support.valid)
    for grid in ((4, 4), (3, 5)):  # cells of whole patches, and cells across their edges
        signs, changed = (Sides.of(s, grid).signs(contrast=True) for s in (support, other))
        assert torch.equal(signs, -changed)
        assert bool((signs != 0).any())


def test_without_contrast_the_rest_says_nothing() -> None:
    signs = Sides.of(_support(3), (8, 8)).signs(contrast=False)
    assert set(signs.unique().tolist()) == {0.0, 1.0}


def test_objects_smaller_than_a_cell_have_a_side() -> None:
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    labels[:, 4:10, 4:10] = 1
    signs = Sides.of(EncodedSupport.of(random_pyramid(64), labels, 1), (4, 4)).signs(contrast=True)
    assert float(signs[0, 0, 0]) > 0
    assert bool((signs[0, 0, 1:] == -1).all())


def test_a_positive_factor_on_the_features_changes_no_correlation() -> None:
    query, support = random_pyramid(64).coarse[1][0], random_pyramid(64, 1, 1).coarse[1][0]
    plain = unit_tokens(query) @ unit_tokens(support).transpose(1, 2)
    torch.testing.assert_close(unit_tokens(8 * query) @ unit_tokens(0.3 * support).transpose(1, 2), plain)


@pytest.mark.parametrize("reader", READERS)
def test_unannotated_pixels_change_nothing_in_a_trained_teacher(reader: str) -> None:
    teacher, query = _teacher(reader, trained=True), random_pyramid(64)
    labels = torch.randint(0, 2, (2, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels[:, :32] = IGNORE

    def noisy_above(block: Tensor) -> Tensor:
        changed = block.clone()
        changed[:, :, : block.shape[2] // 2] += torch.randn_like(changed[:, :, : block.shape[2] // 2])
        return changed

    features = random_pyramid(64, 2, 1)
    # without the deep stage, which is enlarged bilinearly across the border of what is annotated
    changed = FeaturePyramid((*features.map(noisy_above).stages[:-1], features.stages[-1]), features.size)
    kept, other = (_logits(teacher, query, EncodedSupport.of(f, labels, 1)) for f in (features, changed))
    assert torch.equal(kept, other)


# learning


def _blob_support(backbone: Backbone, seeds: tuple[int, ...]) -> tuple[FeaturePyramid, Tensor]:
    slices = [blobs(seed) for seed in seeds]
    images = torch.stack([torch.from_numpy(s.image).float() for s in slices])
    images = (images - images.amin()) / (images.amax() - images.amin())
    labels = torch.stack([torch.from_numpy(s.labels) for s in slices])
    side = 32 * (labels.shape[-1] // 32)
    images, labels = images[:, :side, :side], labels[:, :side, :side]
    return backbone(images[:, None].expand(-1, 3, -1, -1)), labels


def _lite0(reader: str = "pool") -> FewShotHead:
    torch.manual_seed(0)
    return FewShotHead(load_backbone().spec, 1, HeadForm("default", "default", "uino", 8, reader))


def test_before_training_prototypes_and_maps_rank_the_object_of_the_support_first() -> None:
    backbone, head = load_backbone(), _lite0()
    features, labels = _blob_support(backbone, (0,))
    assert isinstance(head.teacher, UinoTeacher)
    with torch.no_grad():
        keys = head.teacher.encode(EncodedSupport.of(features, labels, 1))
        maps = head.teacher.coarse(features, keys)
    share = F.adaptive_avg_pool2d((labels == 1).float()[:, None], maps.mid.shape[-2:])[0, 0]
    prior = (features.coarse[1][-1], keys.inside[head.teacher.late[0] - 1], keys.outside[head.teacher.late[0] - 1])
    similarity = (unit_tokens(prior[0])[0] @ (prior[1] - prior[2])[0]).reshape(share.shape)
    for ranked in (similarity, maps.mid[0, 0, -1], maps.mid[0, 0].mean(0)):
        best = ranked.argmax()
        assert float(share.flatten()[best]) > 0.5
        assert float(ranked[share > 0.5].mean()) > float(ranked[share == 0].mean())


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_hundred_steps_on_one_episode_learn_it_and_leave_the_backbone_alone(reader: str) -> None:
    backbone, head = load_backbone(), _lite0(reader)
    features, labels = _blob_support(backbone, (0, 1))
    assert not any(block.requires_grad for stage in features.stages for block in stage)
    assert isinstance(head.decoder, SlimDecoder)
    head.decoder.fit_norms(features)
    support, query = EncodedSupport.of(features[:1], labels[:1], 1), features[1:]
    target, present = labels[1:].long(), torch.ones(1, dtype=torch.bool)
    optimizer = torch.optim.AdamW(head.teacher.parameters(), lr=3e-3)
    head.teacher.train()
    for _ in range(100):
        found = head.teacher(query, head.teacher.encode(support))
        loss = segmentation_loss(merge_classes(found.logits), target) + map_loss(found.coarse, target, present)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.teacher.eval()
    labeled = merge_classes(_logits(head.teacher, query, support)).argmax(1) == 1
    truth = target == 1
    assert float((labeled & truth).sum() / (labeled | truth).sum()) > 0.9
    assert all(p.grad is None for p in backbone.parameters())
    unused = [name for name, p in head.teacher.named_parameters() if p.grad is None]
    assert not unused


def test_before_training_all_readers_give_the_same_logits() -> None:
    query, support = random_pyramid(64), _support(2)
    first = _logits(_teacher("pool"), query, support)
    for reader in READERS:
        teacher = _teacher(reader)
        keys = teacher.encode(support)
        assert not teacher.dense_prompt(query, keys).any()
        assert torch.equal(_logits(teacher, query, support), first)
        assert not torch.equal(_logits(_teacher(reader, trained=True), query, support), first)


def test_with_a_frozen_decoder_only_the_prompts_move() -> None:
    teacher = _teacher(trained=True)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.requires_grad_(False)
    for module in teacher.prompt_modules:
        module.requires_grad_(True)
    learning = [p for p in teacher.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.01)
    found = teacher(random_pyramid(64), teacher.encode(_support(2)))
    segmentation_loss(merge_classes(found.logits), torch.ones(1, 64, 64, dtype=torch.long)).backward()
    optimizer.step()
    moved = {name for name, value in teacher.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.partition(".")[0] for name in moved} == {"dense", "sparse"}  # pool has no parameters
    assert {name for name in before if name.startswith(("dense.", "sparse."))} == moved


def test_a_teacher_that_is_stored_is_the_same_and_a_seed_repeats() -> None:
    query, support = random_pyramid(64), _support(2)
    for reader in READERS:
        teacher = _teacher(reader, trained=True)
        again = _teacher(reader)
        again.load_state_dict(teacher.state_dict())
        assert torch.equal(_logits(again, query, support), _logits(teacher, query, support))
        assert torch.equal(_logits(_teacher(reader, trained=True), query, support), _logits(teacher, query, support))


def test_a_support_without_annotation_is_refused() -> None:
    support = _support(1)
    with pytest.raises(ValueError, match="annotated"):
        _teacher().encode(EncodedSupport(support.features, support.masks, torch.zeros(1, 64, 64)))


# SAM's mask decoder


def _sam_teacher() -> UinoTeacher:
    torch.manual_seed(0)
    decoder = SlimDecoder(SMALL_SPEC.coarse_blocks, SMALL_SPEC.skip_channels, width=8)
    return UinoTeacher(SMALL_SPEC, decoder, UinoSettings(width=256, heads=8, decoder="sam")).eval()


def test_sam_s_decoder_gives_logits_of_the_query_size_and_its_mask_moves_the_maps() -> None:
    teacher, query, support = _sam_teacher(), random_pyramid(64, 2), _support(3, classes=2)
    with torch.no_grad():
        keys = teacher.encode(support)
        maps, logits = teacher.outputs(query, keys)
        assert logits is not None
        assert torch.equal(teacher(query, keys).logits, logits)
        assert logits.shape == (2, 2, 2, 64, 64)
        mask = logits[:, :, 1] - logits[:, :, 0]
        assert float(mask.std()) > 0
        assert teacher.sam is not None
        teacher.sam.gain.fill_(1.0)
        moved, _ = teacher.outputs(query, keys)
    plain = UinoTeacher(SMALL_SPEC, teacher.decoder, UinoSettings(width=256, heads=8)).eval()
    with torch.no_grad():
        for before, unmoved in zip(maps, plain.coarse(query, plain.encode(support)), strict=True):
            torch.testing.assert_close(before, unmoved)  # the factors of the mask begin at zero
    # the mask has four cells for each of the 4 x 4 of the mid stage; each map has its mean over a cell
    for before, after in zip(maps, moved, strict=True):
        cells = after.shape[-2:]
        added = (torch.logit(after.double()) - torch.logit(before.double()))[:, :, 0]
        assert added.shape == (2, 2, *cells)
        with torch.no_grad():
            fine = teacher.sam.decoder(
                (teacher.embedding(query)[:, None] + teacher.dense_prompt(query, keys)).flatten(0, 1),
                keys.sparse.repeat(2, 1)[:, None],
            ).unflatten(0, (2, 2))[:, :, 0]
        step = 16 // cells[0]
        expected = fine.unfold(2, step, step).unfold(3, step, step).mean((4, 5))
        torch.testing.assert_close(added.float(), expected, atol=2e-3, rtol=2e-3)


def test_shots_of_a_teacher_with_sam_s_decoder_have_no_order() -> None:
    teacher, query, support = _sam_teacher(), random_pyramid(64), _support(4)
    shuffled = support[torch.tensor([3, 0, 2, 1])]
    torch.testing.assert_close(
        _logits(teacher, query, support), _logits(teacher, query, shuffled), atol=1e-4, rtol=1e-4
    )


def test_a_frozen_sam_decoder_stays_and_all_other_modules_of_the_teacher_move() -> None:
    teacher = _sam_teacher()
    assert teacher.sam is not None
    teacher.sam.decoder.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in teacher.parameters() if p.requires_grad], lr=0.01)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    maps, logits = teacher.outputs(random_pyramid(64), teacher.encode(_support(2)))
    assert logits is not None
    target = torch.ones(1, 64, 64, dtype=torch.long)
    (
        segmentation_loss(merge_classes(logits), target) + map_loss(maps, target, torch.ones(1, dtype=torch.bool))
    ).backward()
    optimizer.step()
    moved = {name for name, value in teacher.state_dict().items() if not torch.equal(value, before[name])}
    assert not [name for name in moved if name.startswith("sam.decoder.")]
    assert {"adapter", "dense", "sparse", "sam", "evidence"} == {name.partition(".")[0] for name in moved}


def test_sam_s_decoder_needs_its_width() -> None:
    with pytest.raises(SettingsError, match="uino_width is 64, but SAM's mask decoder has 256; give uino_width 256"):
        FewShotHead(SMALL_SPEC, 1, HeadForm("default", "default", "uino", 8, uino_decoder="sam"))


# memory

MEMORY = """
import sys, torch
sys.path.insert(0, {helpers!r})
from distillfss_core.nn.decoder import SlimDecoder
from distillfss_core.nn.features import EncodedSupport
from distillfss_core.nn.teachers import UinoSettings, UinoTeacher
from distillfss_core.process import peak_mb, reset_peak, resident_mb
from pyramids import SMALL_SPEC, random_pyramid
torch.set_num_threads(1)
torch.set_grad_enabled({gradient})
side, shots = {side}, {shots}
decoder = SlimDecoder(SMALL_SPEC.coarse_blocks, SMALL_SPEC.skip_channels, width=4)
teacher = UinoTeacher(SMALL_SPEC, decoder, UinoSettings(reader={reader!r}, width=16, heads=2))

def run(side, shots):
    labels = torch.zeros(shots, side, side, dtype=torch.uint8)
    labels[:, : side // 2] = 1
    keys = teacher.encode(EncodedSupport.of(random_pyramid(side, shots, 1), labels, 1))
    query = random_pyramid(side)
    reset_peak()
    before = resident_mb()
    prompt = teacher.dense_prompt(query, keys)
    if {gradient}:
        prompt.sum().backward()
    return peak_mb() - before

run(64, 1)
print(run(side, shots))
"""


def _megabytes(root, *, reader: str, shots: int, side: int = 512, gradient: bool = False) -> float:
    helpers = str(root / "tests" / "helpers")
    code = MEMORY.format(reader=reader, shots=shots, side=side, gradient=gradient, helpers=helpers)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_does_not_grow_with_shots_and_with_a_gradient_not_faster_than_they_do(root) -> None:
    one, eight = (_megabytes(root, reader="pool", shots=n) for n in (1, 8))
    assert one > 20  # the volume alone is 1024 x 1024 x 5 numbers
    assert eight < 1.3 * one
    one, four = (_megabytes(root, reader="cp4d", shots=n, side=256, gradient=True) for n in (1, 4))
    assert four < 4 * one + 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_attention_never_builds_the_volume(root) -> None:
    volume = 5 * 4096 * 4096 * 4 / 1e6
    assert _megabytes(root, reader="attention", shots=1, side=1024) < volume / 8


# the scan


def _loop(x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor) -> Tensor:
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], write.shape[-1])
    rows = []
    for t in range(x.shape[1]):
        decay = torch.exp(step[:, t] * rate)[..., None, None]
        state = decay * state + (step[:, t, :, None] * x[:, t])[..., None] * write[:, t, None, None]
        rows.append((state * read[:, t, None, None]).sum(-1))
    return torch.stack(rows, 1)


def _sequences(length: int, batch: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(length)
    heads, p, n = 2, 3, 4
    x, step = torch.randn(batch, length, heads, p).double(), torch.rand(batch, length, heads).double()
    write, read = torch.randn(2, batch, length, n).double()
    return x, step, -torch.tensor([0.3, 4.0]).double(), write, read


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_the_scan_in_chunks_equals_the_loop(length: int) -> None:
    parts = _sequences(length)
    expected = _loop(*parts)
    for chunk in (64, 7):
        torch.testing.assert_close(selective_scan(*parts, chunk=chunk), expected, atol=1e-12, rtol=1e-10)


def test_the_gradient_of_the_scan_is_right() -> None:
    parts = tuple(part.requires_grad_() for part in _sequences(9, batch=1))
    assert torch.autograd.gradcheck(lambda *p: selective_scan(*p, chunk=4), parts)


def test_the_scan_forgets_by_decays_from_0_to_1() -> None:
    torch.manual_seed(0)
    decays = SelectiveScan(8).decays(5 * torch.randn(3, 50, 8)).detach()
    assert 0 < float(decays.min()) < 0.9
    assert 0.9 < float(decays.max()) <= 1


def test_a_reversed_sequence_backward_is_the_reversed_output() -> None:
    torch.manual_seed(0)
    scan, x = SelectiveScan(8).double(), torch.randn(2, 70, 8).double()
    torch.testing.assert_close(scan(x.flip(1), reverse=True), scan(x).flip(1), atol=0, rtol=0)
    assert float((scan(x, reverse=True) - scan(x)).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_long_sequence_is_finite_in_half_precision(dtype: torch.dtype) -> None:
    parts = tuple(part.to(dtype) for part in _sequences(4096, batch=1))
    y = selective_scan(*parts)
    assert y.dtype == dtype
    assert bool(torch.isfinite(y).all())
    scan = SelectiveScan(8).to(dtype)
    correlations = (2 * torch.rand(1, 4096, 8) - 1).to(dtype)
    assert bool(torch.isfinite(scan(correlations)).all())

"""benchmarks/backbones.py: what learns in which way, and the table of its rows."""

import json

import numpy as np
import pytest
import torch

from distillfss_core.models.preprocess import fit_preprocess
from distillfss_core.nn.backbones import DistillingBackbone, load_backbone
from distillfss_core.settings import BackboneSettings
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training.backbone_views import Views
from distillfss_core.training.crops import Augmentation, CropSampler
from distillfss_core.types import AnnotatedSlice

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backbones(import_benchmark):
    return import_benchmark("backbones")


@pytest.fixture
def slices():
    rng = np.random.default_rng(0)
    images = rng.normal(60, 10, (5, 64, 64))
    labels = np.zeros((5, 64, 64), np.uint8)
    labels[:, 16:48, 16:48] = 1
    return [AnnotatedSlice((i + 120 * m).astype(np.uint8), m) for i, m in zip(images, labels, strict=True)]


@pytest.mark.filterwarnings("ignore:.*has random weights:UserWarning")
@pytest.mark.parametrize(
    ("name", "weights", "loss"), [("efficientnet_lite0", "packaged", None), ("lcnet_050", "random", "mse")]
)
def test_the_head_learns_on_a_frozen_backbone_and_the_backbone_too_where_it_can(backbones, slices, name, weights, loss):
    start = load_backbone(name, weights)
    before = {key: x.clone() for key, x in start.state().items()}
    backbone = start if loss is None else DistillingBackbone(start)
    model = backbones.Segmenting(backbone, 0)
    preprocess = fit_preprocess([s.image for s in slices])
    sampler = CropSampler(SupportSet(tuple(slices)), preprocess, 64, Augmentation())
    settings = BackboneSettings(steps=60, size=64, batch=2, device="cpu", views=1)
    views = Views([s.image for s in slices], 64, 1, 0)
    for _ in views.scan():
        pass
    backbones.train(model, sampler, settings, views, loss)
    same = all(torch.equal(x, before[key]) for key, x in backbone.state().items())
    assert same == (loss is None)
    larger = [  # its sides are no multiples of the coarsest stride
        AnnotatedSlice(*(np.pad(part, ((12, 0), (12, 0)), "symmetric") for part in (s.image, s.labels))) for s in slices
    ]
    scores = backbones.scores(model, preprocess, {"same": slices, "larger": larger})
    assert scores["same"] > 0.5
    if loss is None:
        assert scores["larger"] > 0.6


def test_the_table_has_mean_and_deviation_of_the_draws(backbones, tmp_path, capsys):
    rows = [
        {"student": "a", "teacher": "b", "way": "mse", "draw": d, "iou": dict.fromkeys(backbones.KINDS, iou)}
        for d, iou in enumerate((0.25, 0.75))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    backbones.table(path)
    assert "| a | b | mse | 0.500 ± 0.250 | 0.500 ± 0.250 | 0.500 ± 0.250 |" in capsys.readouterr().out

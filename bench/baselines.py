"""What people use today, as models of the bench: pixel classifiers that are fitted on the support slices."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from skimage.feature import multiscale_basic_features
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from distillfss_core.backbones import load_backbone
from distillfss_core.preprocess import Preprocess, fit_preprocess, resize
from distillfss_core.support import SupportSet
from distillfss_core.training.zoom import point_features
from distillfss_core.types import IGNORE, Array

POINTS = 60_000  # annotated pixels that a classifier is fitted on at most, shared by the slices
BAND = 1 << 16  # pixels predicted at a time


@dataclass
class PixelClassifier:
    """A classifier of pixels by their features; ``kind`` is "forest" (multiscale intensity, edges and texture, random
    forest: the usual tool of interactive segmentation) or "regression" (logistic regression on the backbone's features
    at zoom 1)."""

    kind: str
    preprocess: Preprocess
    model: Any = None

    @classmethod
    def fit(cls, kind: str, support: SupportSet) -> PixelClassifier:
        scope = "volume" if support.planes_of_one_volume else "image"
        found = cls(kind, fit_preprocess([s.image for s in support.slices], scope=scope))
        rng, x, y = np.random.default_rng(0), [], []
        for labelled in support.slices:
            features, known = found._features(labelled.image), np.argwhere(labelled.labels != IGNORE)
            points = known[rng.permutation(len(known))[: POINTS // len(support)]]
            x.append(features(points))
            y.append(labelled.labels[points[:, 0], points[:, 1]])
        if kind == "forest":
            found.model = RandomForestClassifier(100, min_samples_leaf=2, n_jobs=-1, random_state=0)
        else:
            found.model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, C=0.1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found.model.fit(np.concatenate(x), np.concatenate(y))
        return found

    def predict_labels(self, image: Array) -> Array:
        features = self._features(image)
        points = np.argwhere(np.ones(image.shape[:2], bool))
        parts = [self.model.predict(features(points[i : i + BAND])) for i in range(0, len(points), BAND)]
        return np.concatenate(parts).reshape(image.shape[:2]).astype(np.uint8)

    def _features(self, image: Array) -> Any:
        """A function from pixels (n y x) to their features (n f)."""
        pre = self.preprocess
        x = pre.to_tensor(pre.as_channels(image), pre.limits(image))
        if self.kind == "forest":
            grey_or_colour = x.movedim(0, -1).numpy() if pre.channels > 1 else x[0].numpy()
            axis = -1 if pre.channels > 1 else None
            maps = multiscale_basic_features(grey_or_colour, sigma_min=1, sigma_max=16, channel_axis=axis)
            return lambda points: maps[points[:, 0], points[:, 1]]
        if not hasattr(self, "_backbone"):
            self._backbone = load_backbone()
        h, w = x.shape[-2:]
        size = (max(h, 32), max(w, 32))
        pyramid = self._backbone(resize(x[None], size))
        scale = torch.tensor([size[0] / h, size[1] / w])
        return lambda points: point_features(pyramid, torch.from_numpy(points) * scale).numpy()

"""Other models for the same task; each learns from a support set and predicts labels.

None is tuned: a peer has the settings that its makers give it, or those written here, for all data sets alike.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distillfss_core.errors import DistillFSSError
from distillfss_core.models.engines import import_openvino
from distillfss_core.models.preprocess import Preprocess, fit_preprocess
from distillfss_core.nn.backbones import SPECS
from distillfss_core.nn.backbones.trunks import create_net
from distillfss_core.nn.backbones.weights import packaged_tensors
from distillfss_core.nn.device import Device, choose_device, seeded
from distillfss_core.nn.losses import dice_loss
from distillfss_core.settings import DistillSettings
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training import distill, refine, unrefined_teacher
from distillfss_core.training.crops import CropSampler
from distillfss_core.training.distillation import auto_steps
from distillfss_core.training.preparation import augmentation
from distillfss_core.types import IGNORE, Array

POINTS = 60_000
"""Annotated pixels that a classifier of pixels is fitted on at most, shared by the slices."""

_BAND = 1 << 16  # pixels predicted at a time
_UNET = "efficientnet_lite0"
_UNET_CHANNELS = (128, 64, 32, 16, 16)
_VGG_FILE = "VGG16's weights (vgg16-397923af.pth of download.pytorch.org)"


class PeerUnavailableError(DistillFSSError):
    """Error for a peer that cannot run here: a package or weights are missing."""


class TrainedPeer(Protocol):
    """A trained model, which predicts labels."""

    def predict_labels(self, image: Array) -> Array:
        """Labels "y x", uint8."""


@dataclass(frozen=True)
class Peer:
    """A kind of model, and the function that trains it.

    Parameters
    ----------
    title : str
    learn : function of (SupportSet, DistillSettings)
        Of the settings, other tools take ``seed``, ``steps``, ``queries``, ``crop`` and ``device`` where it has them.
    packages : mapping of str to str
        Modules that it needs, and how they are installed.
    imports : sequence of str
        Modules that it imports while it learns, where they are installed.
    """

    title: str
    learn: Callable[[SupportSet, DistillSettings], TrainedPeer]
    packages: tuple[tuple[str, str], ...] = ()
    imports: tuple[str, ...] = ()

    def load(self) -> None:
        """Import what it needs, so that no clock sees it."""
        for module in self.imports:
            if importlib.util.find_spec(module.partition(".")[0]) is not None:
                import_openvino() if module == "openvino" else importlib.import_module(module)

    def missing(self) -> str | None:
        """Reason that the peer cannot run here, if a package is missing."""
        for module, package in self.packages:
            if importlib.util.find_spec(module) is None:
                return f"not installed: pip install {package}"
        return None


# -- a classifier of pixels -------------------------------------------------------------------------------


class RandomForest:
    """A random forest of 100 trees on multiscale intensity, edges and texture: the usual tool of interactive
    segmentation.

    Parameters
    ----------
    support : SupportSet
    seed : int
        Draws at most `POINTS` annotated pixels over all slices, and the trees.
    """

    def __init__(self, support: SupportSet, seed: int = 0) -> None:
        from sklearn.ensemble import RandomForestClassifier

        self.preprocess: Preprocess = _preprocess(support)
        x, y = [], []
        for labeled, points in zip(support.slices, _points(support, seed), strict=True):
            x.append(self._features(labeled.image)[points[:, 0], points[:, 1]])
            y.append(labeled.labels[points[:, 0], points[:, 1]])
        threads = torch.get_num_threads()
        self._trees = RandomForestClassifier(100, min_samples_leaf=2, n_jobs=threads, random_state=seed)
        self._trees.fit(np.concatenate(x), np.concatenate(y))

    def predict_labels(self, image: Array) -> Array:
        """Labels uint8 "y x" of an image "y x" or "y x c"."""
        features = self._features(image)
        rows = features.reshape(-1, features.shape[-1])
        parts = [self._trees.predict(rows[i : i + _BAND]) for i in range(0, len(rows), _BAND)]
        return np.concatenate(parts).reshape(image.shape[:2]).astype(np.uint8)

    def _features(self, image: Array) -> Array:
        """Features "y x f"."""
        from skimage.feature import multiscale_basic_features

        x = _normalized(self.preprocess, image)
        is_color = self.preprocess.channels > 1
        return np.asarray(
            multiscale_basic_features(
                x.movedim(0, -1).numpy() if is_color else x[0].numpy(),
                sigma_min=1,
                sigma_max=16,
                channel_axis=-1 if is_color else None,
            )
        )


class Convpaint:
    """napari-convpaint [1]_ through its Python interface, with its own settings: features, then CatBoost.

    References
    ----------
    .. [1] Hinderling et al., preprint on Convpaint, bioRxiv, doi:10.1101/2024.09.12.610926, 2024.
    """

    def __init__(self, alias: str, support: SupportSet, seed: int) -> None:
        from napari_convpaint.convpaint_model import ConvpaintModel

        color = support.slices[0].image.ndim == 3
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of feature extractors that nobody asked for
                self._model = ConvpaintModel(alias)
        except ValueError as error:
            if "download" not in str(error).lower():
                raise
            raise PeerUnavailableError(f"{_VGG_FILE} are not here and cannot be downloaded") from error
        self._model.set_param("channel_mode", "rgb" if color else "single")
        annotations = []
        for labeled, points in zip(support.slices, _points(support, seed), strict=True):
            y, x = points.T
            painted = np.zeros(labeled.labels.shape, np.uint8)  # 0: not annotated, 1: background, 2..: classes
            painted[y, x] = labeled.labels[y, x] + 1
            annotations.append(painted)
        self._model.train([_channels_first(s.image) for s in support.slices], annotations)

    def predict_labels(self, image: Array) -> Array:
        """Labels uint8 "y x" of an image "y x" or "y x c"."""
        return (np.asarray(self._model.segment(_channels_first(image))) - 1).astype(np.uint8)


def _channels_first(image: Array) -> Array:
    return np.moveaxis(image, -1, 0) if image.ndim == 3 else image


def _points(support: SupportSet, seed: int) -> list[Array]:
    """Annotated pixels (n, 2) of every slice that a classifier is fitted on."""
    rng = np.random.default_rng(seed)
    points = []
    for labeled in support.slices:
        annotated = np.argwhere(labeled.labels != IGNORE)
        points.append(annotated[rng.permutation(len(annotated))[: POINTS // len(support)]])
    return points


# -- a network ---------------------------------------------------------------------------------------------


class UNet:
    """A U-Net of segmentation-models-pytorch, fine-tuned whole.

    Its encoder is EfficientNet-Lite0 with the same ImageNet weights as the default backbone, so only the layers on top
    and their training differ. AdamW at 1e-3, one cycle, cross-entropy and Dice, 300 steps and 16 for each slice beyond
    five (like the default on planes of one volume; on separate images the default takes 150 fewer), of as many crops as
    the default, cut and augmented alike, at zoom 1.
    """

    def __init__(self, support: SupportSet, settings: DistillSettings) -> None:
        import segmentation_models_pytorch as smp

        self.device: Device = choose_device(settings.device, "float32")
        self.preprocess: Preprocess = _preprocess(support)
        spec = SPECS[_UNET]
        with seeded(settings.seed):
            self._net = smp.Unet(
                f"tu-{spec.timm_name}",
                encoder_weights=None,
                decoder_channels=_UNET_CHANNELS,
                in_channels=3,
                classes=support.classes + 1,
            )
        tensors, _ = packaged_tensors(spec, create_net(spec))
        encoder = self._net.encoder.model
        lost = encoder.load_state_dict(tensors, strict=False).missing_keys
        assert all(key.endswith("num_batches_tracked") for key in lost), lost
        self._mean, self._std = (torch.tensor(v)[:, None, None] for v in (spec.mean, spec.std))
        self._net.to(self.device.torch)
        self._train(support, settings)

    def _train(self, support: SupportSet, settings: DistillSettings) -> None:
        sampler = CropSampler(support, self.preprocess, settings.crop_size, augmentation(settings, support, "any"))
        rng = np.random.default_rng(settings.seed)
        steps = settings.steps or auto_steps(len(support))
        parameters = self._net.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
        self._net.train()
        for _ in range(steps):
            crops = [sampler.cut(int(rng.integers(len(support))), rng) for _ in range(max(2, settings.queries))]
            x = self._input(torch.stack([v.image for v in crops]))
            y = torch.stack([v.labels for v in crops]).long().to(self.device.torch)
            logits = self._net(x)
            if not bool((y != IGNORE).any()):
                continue
            loss = F.cross_entropy(logits, y, ignore_index=IGNORE) + dice_loss(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self._net.eval()

    def _input(self, x: Tensor) -> Tensor:
        return ((x - self._mean) / self._std).to(self.device.torch)

    @torch.inference_mode()
    def predict_labels(self, image: Array) -> Array:
        """Labels uint8 "y x" of an image "y x" or "y x c"."""
        x = _normalized(self.preprocess, image).numpy()
        h, w = x.shape[-2:]
        x = np.pad(x, ((0, 0), (0, -h % 32), (0, -w % 32)), mode="symmetric")
        logits = self._net(self._input(torch.from_numpy(x)[None]))[0, :, :h, :w]
        return np.asarray(logits.argmax(0).byte().cpu().numpy())


def _preprocess(support: SupportSet) -> Preprocess:
    scope = "volume" if support.planes_of_one_volume else "image"
    objects = [(s.labels > 0) & (s.labels != IGNORE) for s in support.slices]
    return fit_preprocess([s.image for s in support.slices], scope=scope, objects=objects)


def _normalized(preprocess: Preprocess, image: Array) -> Tensor:
    return preprocess.to_tensor(preprocess.as_channels(image), preprocess.limits(image))


_SKLEARN = (("sklearn", "scikit-learn"), ("skimage", "scikit-image"))
_CONVPAINT = (("napari_convpaint", "napari-convpaint"),), ("napari_convpaint.convpaint_model", "catboost")
_OURS = ("timm", "onnx", "onnxruntime", "openvino")
_SMP = (("segmentation_models_pytorch", "segmentation-models-pytorch"),), ("segmentation_models_pytorch", "timm")

PEERS = {
    "forest": Peer(
        "random forest",
        lambda s, o: RandomForest(s, o.seed),
        _SKLEARN,
        ("sklearn.ensemble", "skimage.feature"),
    ),
    "convpaint-gaussian": Peer("convpaint, gaussian", lambda s, o: Convpaint("gaussian", s, o.seed), *_CONVPAINT),
    "convpaint-vgg16": Peer("convpaint, VGG16", lambda s, o: Convpaint("vgg", s, o.seed), *_CONVPAINT),
    "unet": Peer("U-Net on EfficientNet-Lite0", UNet, *_SMP),
    "probe": Peer("probe (linear, our features)", lambda s, o: distill(s, replace(o, method="probe")), imports=_OURS),
    "teacher": Peer("teacher as it comes", unrefined_teacher, imports=("timm",)),
    "transferfss": Peer("TransferFSS (refined teacher)", refine, imports=("timm",)),
    "distillfss": Peer("DistillFSS (student)", distill, imports=_OURS),
}
"""By the names of ``--baselines``; the last four are ours."""

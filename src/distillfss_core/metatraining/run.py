"""Meta-training: a head, and on request a backbone, learn to read a support set from episodes of many tasks.

The training can be stopped at any moment. It is the episodic training of DCAMA [1]_, with other episodes.

References
----------
.. [1] Shi, Wei, Zhang, Lu, Ning, Chen, Ma, Zheng, "Dense Cross-Query-and-Support Attention Weighted Mask
   Aggregation for Few-Shot Segmentation", ECCV 2022.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from distillfss_core.errors import ModelFileError, SettingsError
from distillfss_core.io.writing import make_folder
from distillfss_core.metatraining.curves import draw_curves
from distillfss_core.metatraining.episodes import Episode, EpisodeMix, held_out_task, with_foreign_masks
from distillfss_core.metatraining.real import RealSource
from distillfss_core.metatraining.task import U8, Task
from distillfss_core.nn.adapter_file import load_adapter
from distillfss_core.nn.backbone_file import read_backbone_card
from distillfss_core.nn.backbones import (
    SPECS,
    TRAINED,
    Backbone,
    Encoder,
    LearningBackbone,
    backbone_from_state,
    backbone_spec,
    load_backbone,
)
from distillfss_core.nn.backbones.weights import BACKBONE_FILE
from distillfss_core.nn.checkpoint import (
    FileKind,
    kind_of,
    read_card_file,
    restore_training,
    training_tensors,
    write_card_file,
)
from distillfss_core.nn.decoder import SlimDecoder
from distillfss_core.nn.device import Device, choose_device, seeded
from distillfss_core.nn.features import (
    CoarseMaps,
    EncodedSupport,
    FeaturePyramid,
    cat_pyramids,
    merge_classes,
    strongest,
)
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.nn.losses import map_loss, segmentation_loss
from distillfss_core.nn.pretrained import HeadWeights, halved, head_form, load_head, packaged_head, save_head
from distillfss_core.nn.sam import WIDTH as SAM_WIDTH
from distillfss_core.nn.sam_decoder import load_sam_decoder
from distillfss_core.nn.teachers import LearnedTeacher, UinoTeacher
from distillfss_core.settings import TEACHERS, PretrainSettings, upgrade_settings
from distillfss_core.types import IGNORE, TrainStep

log: logging.Logger = logging.getLogger(__name__)

CHECKPOINT_FILE = FileKind("distillfss-pretrain", "checkpoint of a meta-training", 1)
CHECKPOINT, HEAD, CURVES = "checkpoint.safetensors", "head.safetensors", "curves.png"

KEEP_EVERY = 60.0  # seconds between two checkpoints
WARM_UP = 200  # steps until the full learning rate
COOL_DOWN = 0.3  # share of the steps in which the rate falls to nothing
KEYS = 128  # support keys a stage in a training step; another draw in every step
NORM_TASKS = 32  # tasks on which the decoder's skip features are standardized
LOGGED = 50  # steps that one line of the history stands for
NECK = "trained with the episodes: a neck, not distilled from SAM"
FROZEN, TRAINED_ON = ", not changed since", ", then trained with the episodes"
MAY_CHANGE = {"steps", "workers", "eval_every", "eval_tasks", "device", "precision"}
"""Settings that a training may go on with another value of."""


class PretrainRun(Iterator[TrainStep]):
    """A meta-training in steps; it stores its state in a folder and resumes from it.

    Killed at any moment and started again with the same settings and sets, it reaches the same weights (on one
    machine's CPU).

    Parameters
    ----------
    settings : PretrainSettings
    folder : Path
        Made if need be. It gets ``checkpoint.safetensors`` every minute, ``curves.png`` and, from `finish`,
        ``head.safetensors``.
    real, held_out : RealSource, optional
        Real images for training, and others for evaluation; without the former all episodes are generated.

    Raises
    ------
    SettingsError
        If the folder holds a training with other settings or sets, or a backbone is to learn that is not a light one.
    """

    def __init__(
        self,
        settings: PretrainSettings,
        folder: Path,
        *,
        real: RealSource | None = None,
        held_out: RealSource | None = None,
    ) -> None:
        self.settings: PretrainSettings = settings
        self.folder: Path = folder
        self._real, self._held_out = real, held_out
        _check_backbone(settings)
        make_folder(folder, parents=True)
        self.device: Device = choose_device(settings.device, settings.precision)
        head_weights = _head_to_start_from(settings)
        backbone = head_weights.trained_backbone() if head_weights else None
        backbone = backbone or load_backbone(settings.backbone, settings.weights)
        self.backbone: Backbone = backbone.to(self.device.torch)
        self._mix = EpisodeMix(
            real, synthetic=settings.synthetic_fraction, size=settings.size, shots=settings.shots, seed=settings.seed
        )
        with seeded(settings.seed):
            head = FewShotHead(self.backbone.spec, 1, _head_form(settings))
        if head_weights and head_weights.form == _form(settings):
            head_weights.put_into(head)
        elif head_weights:
            head_weights.put_decoder_into(head)
        self._start = dict(head_weights.card) if head_weights else None
        self.teacher: LearnedTeacher = head.teacher
        self._adapter: str = self._take_adapter()
        self._sam: str = self._take_sam()
        self.teacher.to(self.device.torch)
        self._average = self._averaged(self.teacher)
        self._kept: dict[str, nn.Module] = {"teacher": self.teacher, "average": self._average}
        groups: list[dict[str, Any]] = [{"params": self._learning(), "share": 1.0}]
        self._encoder: Encoder = self.backbone
        self._encoder_average: AveragedModel | None = None
        if settings.backbone_lr_scale:
            self._encoder = LearningBackbone(self.backbone).to(self.device.torch)
            self._encoder_average = self._averaged(self._encoder)
            self._kept |= {"backbone": self._encoder, "backbone_average": self._encoder_average}
            groups.append({"params": list(self._encoder.parameters()), "share": settings.backbone_lr_scale})
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self._decode: Any = self.teacher.decoder
        if self.device.kind == "cuda":
            self._decode = torch.compile(self.teacher.decoder, dynamic=True)
        self._judged: dict[str, list[Task]] = {}
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, float] = {}
        self.step: int = 0
        self.seconds: float = 0.0
        if (folder / CHECKPOINT).exists():
            self._restore()
        elif head_weights is None:
            self._fit_norms()
        self._generator = self._run()

    def __iter__(self) -> PretrainRun:
        return self

    def __next__(self) -> TrainStep:
        return next(self._generator)

    def close(self) -> None:
        """Stop; what was done since the last checkpoint is kept too."""
        self._generator.close()

    @property
    def best_teacher(self) -> LearnedTeacher:
        """The teacher with its averaged weights."""
        teacher = self._average.module
        assert isinstance(teacher, LearnedTeacher)
        return teacher.eval()

    def best_backbone(self) -> Backbone:
        """The frozen backbone; where it learns, one of its averaged weights, rounded as a head file keeps them."""
        if self._encoder_average is None:
            return self.backbone
        learned = self._encoder_average.module
        assert isinstance(learned, LearningBackbone)
        best = backbone_from_state(learned.spec.name, halved(learned.state()), f"{TRAINED}{self.backbone.weights}")
        return best.to(self.device.torch)

    def finish(self, card: dict[str, Any] | None = None) -> Path:
        """Write the averaged weights as a head file with its model card; returns its path."""
        path = self.folder / HEAD
        save_head(path, self.best_teacher, self.best_backbone(), self.card() | (card or {}))
        return path

    def card(self) -> dict[str, Any]:
        """How these weights were made: JSON-able."""
        backbone = self.best_backbone()
        return {
            "backbone": {
                "name": backbone.spec.name,
                "weights": backbone.weights,
                "license": backbone.spec.license,
                "digest": backbone.digest(),
            },
            **self._distillation(),
            "width": self.settings.width,
            **_teacher_card(self.settings, self._adapter, self._sam),
            "parameters": sum(p.numel() for p in self.teacher.parameters()),
            "training": {
                "steps": self.step,
                "tasks": self.step * self.settings.tasks,
                "hours": round(self.seconds / 3600, 2),
                "device": str(self.device),
                "torch": torch.__version__,
                "settings": asdict(self.settings),
                "start": self._start,
            },
            "data": self._real.licenses() if self._real else [],
            "held_out": self._held_out.licenses() if self._held_out else [],
            "scores": next(
                (line for line in reversed(self.history) if "real_5_shot" in line or "made_5_shot" in line), {}
            ),
        }

    def _distillation(self) -> dict[str, Any]:
        """What the card says of a backbone that was distilled: the card of its file."""
        weights = self.settings.weights
        if kind_of(weights) != BACKBONE_FILE.name:
            return {}
        card = read_backbone_card(weights)
        is_used = card["backbone"]["digest"] == self.backbone.digest()  # a head to start from may bring its own
        return {"distilled": card} if is_used else {}

    def _run(self) -> Generator[TrainStep, None, None]:
        settings = self.settings
        loader: DataLoader[Any] = DataLoader(
            self._mix,  # type: ignore[arg-type]
            batch_size=settings.tasks,
            sampler=range(self.step * settings.tasks, settings.steps * settings.tasks),
            collate_fn=_as_they_are,
            num_workers=settings.workers,
            prefetch_factor=4 if settings.workers else None,
        )
        saved = began = time.monotonic()
        whole = True  # what is interrupted within a step is not kept: the last checkpoint is
        try:
            for episodes in loader:
                whole = False
                losses = self._train(episodes)
                self.step += 1
                now = time.monotonic()
                self.seconds, began = self.seconds + now - began, now
                metrics: dict[str, float] = {}
                for name, value in losses.items():
                    self._sums[name] = self._sums.get(name, 0.0) + value / LOGGED
                last = self.step == settings.steps
                if self.step % settings.eval_every == 0 or last:
                    metrics = self.judge()
                if self.step % LOGGED == 0:
                    self.history.append({"step": self.step, **self._sums})
                    self._sums = {}
                if metrics:
                    self.history.append({"step": self.step, **metrics})
                whole = True
                if last or now - saved > KEEP_EVERY:
                    self.keep()
                    saved = now
                yield TrainStep(self.step, settings.steps, losses, metrics, "pretrain")
        finally:
            if whole:
                self.keep()

    def _train(self, episodes: list[Episode]) -> dict[str, float]:
        for group in self._optimizer.param_groups:
            group["lr"] = group["share"] * self.settings.learning_rate * _rate(self.step, self.settings.steps)
        self.teacher.train()
        rng = np.random.default_rng([self.settings.seed, self.step])
        with self.device.autocast():
            terms = self._losses(episodes, rng)
        self._optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._average.update_parameters(self.teacher)
        if self._encoder_average is not None:
            self._encoder_average.update_parameters(self._encoder)
        return {name: float(value.detach()) for name, value in terms.items()}

    def _losses(self, episodes: list[Episode], rng: np.random.Generator) -> dict[str, Float[Tensor, ""]]:
        """Compute the losses of all episodes: each image is encoded once, all queries are decoded together."""
        features = self._encode(self._encoder, np.concatenate([e.task.images for e in episodes]))
        labels = torch.from_numpy(np.concatenate([e.task.labels for e in episodes])).to(self.device.torch)
        maps, query_parts, supports, start = [], [], [], 0
        own_logits: list[Tensor] = []
        for episode in episodes:
            for question in episode.questions:
                support = features[torch.tensor(question.support) + start]
                annotated = torch.from_numpy(question.annotated).to(self.device.torch)
                supports.append(EncodedSupport.of(support, annotated, 1))
                keys = self.teacher.encode(supports[-1], max_keys=KEYS, offset=float(rng.random()))
                queries = torch.tensor(question.queries) + start
                found, own = self.teacher.outputs(features[queries], keys)
                maps.append(found)
                own_logits += [] if own is None else [own]
                query_parts.append(queries)
            start += len(episode.task)
        coarse = CoarseMaps(*(torch.cat(stage) for stage in zip(*maps, strict=True)))
        query_images = torch.cat(query_parts)
        logits = merge_classes(self._decode(coarse, features[query_images])).float()
        target = labels[query_images].long()
        present = torch.ones(1, dtype=torch.bool, device=target.device)
        losses = {"teacher": _loss_of_each(logits, target), "attention": 0.3 * map_loss(coarse, target, present)}
        if own_logits:
            losses["mask"] = _loss_of_each(merge_classes(torch.cat(own_logits)).float(), target)
        predicted = strongest(logits).split([len(part) for part in query_parts])
        aligned = [
            loss
            for part, labels_of_part, support in zip(query_parts, predicted, supports, strict=True)
            if (loss := self.teacher.alignment(features[part], labels_of_part, support)) is not None
        ]
        return losses | ({"alignment": 0.3 * torch.stack(aligned).mean()} if aligned else {})

    def _encode(self, encoder: Encoder, images: U8, limit: int = 64) -> FeaturePyramid:
        x = torch.from_numpy(images).movedim(-1, 1)
        parts = []
        with self.device.autocast():
            for start in range(0, len(x), limit):
                batch = self.device.upload(x[start : start + limit].contiguous()) / 255.0
                parts.append(encoder(batch).lean().map(Tensor.float))
        return cat_pyramids(parts)

    def _learning(self) -> list[nn.Parameter]:
        """The parameters of the teacher that learn; the others require no gradient."""
        if self.settings.learn == "prompts":
            self.teacher.requires_grad_(False)
            for module in self.teacher.prompt_modules:
                module.requires_grad_(True)
        return [parameter for parameter in self.teacher.parameters() if parameter.requires_grad]

    def _taken(self) -> dict[str, Any]:
        """The card of the head that the teacher was taken from, not its decoder alone; empty if there is none."""
        return self._start if self._start and head_form(self._start) == _form(self.settings) else {}

    def _take_sam(self) -> str:
        """Start SAM's mask decoder from its checkpoint, if there is one; from what it starts."""
        settings, teacher = self.settings, self.teacher
        prompted = teacher.sam if isinstance(teacher, UinoTeacher) else None
        if prompted is None:
            if settings.sam != "none" or settings.learn == "but-sam":
                raise SettingsError(
                    f"sam is {settings.sam!r} and learn is {settings.learn!r}, but the teacher has no decoder of SAM; "
                    "give teacher 'uino' and uino_decoder 'sam'"
                )
            return ""
        if settings.sam != "none":
            load_sam_decoder(settings.sam, prompted.decoder)
        if settings.learn == "but-sam":
            prompted.decoder.requires_grad_(False)
        return str(self._taken().get("sam", "random weights")) if settings.sam == "none" else Path(settings.sam).name

    def _take_adapter(self) -> str:
        """Give teacher uino the distilled adapter, if there is one, and freeze it; where the adapter comes from."""
        settings, teacher = self.settings, self.teacher
        if settings.adapter == "none":
            origin = str(self._taken().get("adapter", NECK))
            return origin if settings.learn == "prompts" else origin.replace(FROZEN, TRAINED_ON)
        if not isinstance(teacher, UinoTeacher):
            raise SettingsError(f"adapter is {settings.adapter!r}, but teacher {settings.teacher} has none; give uino")
        if self._taken():
            raise SettingsError(f"init_from is {settings.init_from!r}, a head with an adapter; give adapter none")
        weights = load_adapter(settings.adapter)
        weights.put_into(teacher, self.backbone)
        teacher.adapter.requires_grad_(False)
        return weights.origin + FROZEN

    def _averaged(self, module: nn.Module) -> AveragedModel:
        return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(self.settings.ema_decay), use_buffers=True)

    def _fit_norms(self) -> None:
        decoder = self.teacher.decoder
        assert isinstance(decoder, SlimDecoder)
        images = np.concatenate([self._mix[i].task.images[:2] for i in range(NORM_TASKS)])
        decoder.fit_norms(self._encode(self.backbone, images))
        self._average.module.load_state_dict(self.teacher.state_dict())

    # -- held-out tasks

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """Mean IoU of the averaged weights on held-out tasks: 1 shot, 5 shots, and 5 shots with foreign masks."""
        if not self._judged:
            self._judged = self._make_judged()
        backbone = self.best_backbone()
        scores: dict[str, float] = {}
        for name, tasks in self._judged.items():
            foreign = with_foreign_masks(tasks)
            rows = [self._ask(backbone, task, other) for task, other in zip(tasks, foreign, strict=True)]
            one_shot, five_shot, control = np.mean(rows, 0)
            scores |= {f"{name}_1_shot": one_shot, f"{name}_5_shot": five_shot, f"{name}_foreign_masks": control}
        return {name: round(float(value), 4) for name, value in scores.items()}

    def _make_judged(self) -> dict[str, list[Task]]:
        s = self.settings
        sources = {"real": self._held_out, "made": None} if self._held_out else {"made": None}
        return {
            name: [held_out_task(source, i, n_images=6, size=s.size, seed=s.seed) for i in range(s.eval_tasks)]
            for name, source in sources.items()
        }

    def _ask(self, backbone: Backbone, task: Task, foreign: Task) -> tuple[float, float, float]:
        features = self._encode(backbone, task.images)
        order = sorted(range(len(task)), key=lambda i: not (task.labels[i] == 1).any())  # images with the object first
        query, others = order[0], order[1:]
        predictions = []
        for labels, support in ((task.labels, others[:1]), (task.labels, others), (foreign.labels, others)):
            annotated = torch.from_numpy(labels[support]).to(self.device.torch)
            with self.device.autocast():
                keys = self.best_teacher.encode(EncodedSupport.of(features[torch.tensor(support)], annotated, 1))
                logits = merge_classes(self.best_teacher(features[torch.tensor([query])], keys).logits)
            predictions.append(_iou(logits[0].argmax(0).cpu().numpy() == 1, task.labels[query]))
        return predictions[0], predictions[1], predictions[2]

    # -- state

    def keep(self) -> None:
        """Write the state of the training, so that it can go on from here, and its curves."""
        tensors = training_tensors(self._kept, self._optimizer)
        card = {"step": self.step, "seconds": self.seconds, "data": self._data()}
        card |= {"settings": asdict(self.settings)}
        card |= {"history": self.history, "sums": self._sums}
        write_card_file(self.folder / CHECKPOINT, CHECKPOINT_FILE, card, tensors)
        draw_curves(self.history, self.folder / CURVES)

    def _data(self) -> dict[str, list[str]]:
        """Names of the sets that are trained on, and of those kept out of it."""
        provenance = {"real": self._real, "kept_out": self._held_out}
        return {name: list(source.sets) if source else [] for name, source in provenance.items()}

    def _restore(self) -> None:
        path = self.folder / CHECKPOINT
        card, tensors, _ = read_card_file(path, CHECKPOINT_FILE)
        before, now = upgrade_settings(card["settings"]), asdict(self.settings)
        for setting in fields(PretrainSettings):
            name = setting.name
            then = before.get(name, setting.default)
            if name not in MAY_CHANGE and then != now[name]:
                raise SettingsError(
                    f"{path} was made with {name} {then!r}, now it is {now[name]!r}; "
                    "give the same settings to go on, or another folder to start anew"
                )
        if "data" not in card:
            log.warning("%s does not say which sets it was made with; it goes on with those given now", path)
        elif card["data"] != self._data():
            raise SettingsError(
                f"{path} was made with {_sets_text(card['data'])}, now it is given {_sets_text(self._data())}; "
                "give the same to go on, or another folder to start anew"
            )
        if card["step"] > self.settings.steps:
            raise SettingsError(f"{path} is at step {card['step']} already; give at least as many steps")
        try:
            restore_training(self._kept, self._optimizer, tensors)
        except (RuntimeError, ValueError) as error:
            raise ModelFileError(f"{path}: its tensors do not fit ({str(error).splitlines()[0]})") from error
        self.step, self.seconds, self.history = card["step"], card["seconds"], card["history"]
        self._sums = card["sums"]


def sources(folders: Sequence[Path], holdout: Sequence[str]) -> tuple[RealSource | None, RealSource | None]:
    """Sources of real images: one for training, and one of the held-out sets."""
    if not folders:
        return None, None
    real = RealSource(folders, holdout=holdout)
    return real, RealSource(folders, holdout=real.sets) if holdout else None


def _sets_text(data: dict[str, list[str]]) -> str:
    if not data["real"]:
        return "no real sets"
    return f"{', '.join(data['real'])} (kept out: {', '.join(data['kept_out']) or 'none'})"


def _loss_of_each(logits: Float[Tensor, "b k1 h w"], target: Int[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Mean of the losses of single queries."""
    each = [segmentation_loss(z[None], y[None]) for z, y in zip(logits, target, strict=True)]
    return torch.stack(each).mean()


def _head_to_start_from(settings: PretrainSettings) -> HeadWeights | None:
    if settings.init_from == "none":
        if settings.learn == "prompts":
            raise SettingsError("learn is 'prompts', which needs a head to start from; give init_from, or learn 'all'")
        return None
    weights = packaged_head(settings.backbone) if settings.init_from == "packaged" else load_head(settings.init_from)
    if weights is None:
        raise SettingsError(f"this package holds no head for {settings.backbone}; give start none, or a head file")
    if weights.preset != "default":
        raise SettingsError(
            f"head {weights.source} has the {weights.preset} form, which is not meta-trained here; give another"
        )
    spec = backbone_spec(settings.backbone)
    if weights.width != settings.width or backbone_spec(weights.backbone_name).channels != spec.channels:
        raise SettingsError(
            f"head {weights.source} is of {weights.backbone_name} with width {weights.width}, "
            f"but the settings say {settings.backbone} with width {settings.width}; give those of the head"
        )
    if weights.backbone_name != settings.backbone:
        weights = weights.fitted_to(spec)
    own, wanted = weights.form, _form(settings)
    other = [name for name in own if wanted.get(name) != own[name]]
    if settings.learn == "prompts" and other:
        raise SettingsError(
            f"learn is 'prompts', and head {weights.source} has {other[0]} {own[other[0]]}, but the settings say "
            f"{wanted.get(other[0])}; give those of the head, or learn 'all'"
        )
    return weights


def _head_form(settings: PretrainSettings) -> HeadForm:
    from_sam = settings.adapter != "none" or settings.uino_decoder == "sam"
    width, decoder = SAM_WIDTH if from_sam else settings.uino_width, settings.uino_decoder
    return HeadForm(
        "default", "default", TEACHERS[settings.teacher], settings.width, settings.uino_reader, width, decoder
    )


def _form(settings: PretrainSettings) -> dict[str, Any]:
    return head_form(_head_form(settings).to_json())


def _teacher_card(settings: PretrainSettings, adapter: str, sam: str) -> dict[str, Any]:
    """What the card says of a teacher other than DCAMA."""
    if settings.teacher == "dcama":
        return {}
    origins = {"adapter": adapter, "sam": sam} if sam else {"adapter": adapter}
    return _form(settings) | (origins if settings.teacher == "uino" else {})


def _check_backbone(settings: PretrainSettings) -> None:
    if settings.backbone_lr_scale and not backbone_spec(settings.backbone).light:
        light = ", ".join(spec.name for spec in SPECS.values() if spec.light)
        raise SettingsError(
            f"backbone_lr_scale is {settings.backbone_lr_scale}, but {settings.backbone} is too large to be trained; "
            f"give 0, or one of {light}"
        )


def _rate(step: int, steps: int) -> float:
    """Warm-up, a plateau, and a linear fall: a training may be prolonged while it is on the plateau."""
    left = (steps - step) / max(1, round(COOL_DOWN * steps))
    return min(1.0, (step + 1) / WARM_UP, left)


def _iou(predicted: npt.NDArray[np.bool_], labels: U8) -> float:
    annotated = labels != IGNORE
    truth = labels == 1
    union = int(((predicted | truth) & annotated).sum())
    return float((predicted & truth & annotated).sum()) / union if union else 1.0


def _as_they_are(episodes: list[Episode]) -> list[Episode]:
    return episodes

"""Initial weights of a student: attention over a few clusters of keys, written as convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distillfss_core.nn.features import NEUTRAL, EncodedSupport
from distillfss_core.nn.head import FewShotHead
from distillfss_core.nn.students import LightConvDist
from distillfss_core.nn.teachers.dcama import CrossAttention, DcamaTeacher, StageKeys, class_shares
from distillfss_core.nn.teachers.prototype import cluster

LOOK = 0.1  # share of the random start that stays, beside what is known
SEEN = 8  # crops over which the spread of scores is measured
READ = 0.5  # what the channels of a class say for it together, where they answer as strongly as usual


@torch.no_grad()
def start_from_attention(head: FewShotHead, support: EncodedSupport) -> None:
    """Set the weights of a `LightConvDist` to what its teacher's attention would answer, roughly.

    A map of DCAMA is the mean mask value of the keys, weighted by exp(q k / sqrt(d)), where q = W_q t + b_q of the
    normalized token t. The student's channels become the scores of a few centers m of the keys of each class, against
    the mean center; they speak for their class and against the others::

        reduce   s (W_q t + b_q) (m - mean m) / sqrt(d), with s such that its spread over some crops is 1
        look     the identity
        read     1/2 + READ times the mean over the channels of the class, less that over the others

    The latter two keep a little of their random start. From there it learns as from any other. Other teachers, those
    with positions or without normalized tokens, and students of other forms, are left as they are. So are channels of
    a class that the support does not show, or all of them where it shows one thing only.

    Parameters
    ----------
    support : EncodedSupport
        Crops of the annotated slices.
    """
    student, teacher = head.student, head.teacher
    if not isinstance(student, LightConvDist) or not isinstance(teacher, DcamaTeacher):
        return
    if teacher.settings.position or not teacher.settings.normalize:
        return
    stages = teacher.encode(support).stages
    layers = zip(student.reduce, student.look, student.read, strict=True)
    for (reduce, look, read), attention, stage, blocks in zip(
        layers, teacher.DCAMA_blocks, stages, support.features[:SEEN].coarse, strict=True
    ):
        assert isinstance(reduce, nn.Conv2d)
        assert isinstance(look, nn.Conv2d)
        assert isinstance(read, nn.Conv2d)
        assert isinstance(attention, CrossAttention)
        _start_look(look)
        _start_scores(reduce, read, attention, stage, blocks, student.classes)


def _start_look(look: nn.Conv2d) -> None:
    assert look.bias is not None
    look.weight.mul_(LOOK)
    look.weight[:, :, 1, 1] += torch.eye(len(look.weight), device=look.weight.device)
    look.bias.zero_()


def _start_scores(
    reduce: nn.Conv2d,
    read: nn.Conv2d,
    attention: CrossAttention,
    stage: StageKeys,
    blocks: tuple[Tensor, ...],
    classes: int,
) -> None:
    assert reduce.bias is not None
    assert read.bias is not None
    read.weight.mul_(LOOK)
    read.bias.fill_(NEUTRAL)
    channel = column = 0
    for n, block in enumerate(blocks):
        width = len(reduce.weight) // len(blocks) + (n < len(reduce.weight) % len(blocks))
        centers, owner = _centers(stage, n, width)
        if bool((owner != owner[0]).any()):  # a single class has nothing to stand against
            rows, columns = slice(channel, channel + len(owner)), slice(column, column + block.shape[1])
            weight, reduce.bias[rows] = _scores(attention, centers, block)
            reduce.weight[rows] = 0
            reduce.weight[rows, columns, 0, 0] = weight
            for k in range(classes):
                own = owner == k + 1
                if bool(own.any()):
                    read.weight[k * len(blocks) + n, rows, 0, 0] = READ * (own / own.sum() - ~own / (~own).sum())
        channel, column = channel + width, column + block.shape[1]


def _centers(stage: StageKeys, block: int, count: int) -> tuple[Float[Tensor, "p c"], Tensor]:
    """Up to ``count`` centers of a block's keys, evenly many a class, and the class of each (0 is the background)."""
    keys = stage.keys[block].transpose(0, 1).flatten(1)  # l c, the heads side by side
    centers, owner, shares = [], [], class_shares(stage.values).T
    for k, share in enumerate(shares):
        limit = count // len(shares) + (k < count % len(shares))
        inside = F.normalize(keys[share >= 0.5 * share.max()], dim=1)
        if limit and float(share.max()) > 0:
            centers.append(cluster(inside, limit, F.normalize(inside.mean(0), dim=0)))
            owner += [k] * limit
    middle = torch.stack([c.mean(0) for c in centers]).mean(0)
    return torch.cat(centers) - middle, torch.tensor(owner, device=keys.device)


def _scores(
    attention: CrossAttention, centers: Float[Tensor, "p c"], block: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, "p c"], Float[Tensor, " p"]]:
    """Weights and biases that give the scores of normalized tokens, with a spread of 1 over a block."""
    project = attention.linears[0]
    assert isinstance(project, nn.Linear)
    weight, bias = centers @ project.weight, centers @ project.bias
    spread = (attention.tokens(block) @ weight.T + bias).std().clamp_min(1e-6)
    return weight / spread, bias / spread

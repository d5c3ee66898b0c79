"""A plot of two curves over the training steps, the loss and the IoU on the validation slice; it needs Qt only."""

from __future__ import annotations

import numpy as np
from qtpy.QtCore import QPointF, QRectF, QSize, Qt
from qtpy.QtGui import QColor, QPainter, QPaintEvent, QPen, QPolygonF
from qtpy.QtWidgets import QSizePolicy, QWidget

from napari_distillfss._widgets._colors import IOU, LOSS

_MOST_POINTS = 400
_LEAST_SPAN = 0.25  # of the largest loss, from the bottom to the top of the plot


class TrainingPlot(QWidget):
    """Plots the smoothed loss (own scale) and the validation IoU (0 to 1) during a training."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setToolTip(
            "Blue: the loss of the training, which should fall. Orange: IoU on the validation slice (with eight slices "
            "and more, or if you choose one), which should rise."
        )
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.total = 1
        self.losses: list[tuple[int, float]] = []
        self.scores: list[tuple[int, float]] = []

    @property
    def loss(self) -> float | None:
        """The latest smoothed loss, if there is one."""
        return self.losses[-1][1] if self.losses else None

    def sizeHint(self) -> QSize:
        return QSize(280, 110)

    def clear(self) -> None:
        self.losses, self.scores = [], []
        self.update()

    def add(self, index: int, total: int, loss: float | None, score: float | None) -> None:
        """Add a step; None for a number that was not measured."""
        self.total = total
        if loss is not None:
            smooth = loss if not self.losses else 0.8 * self.losses[-1][1] + 0.2 * loss
            self.losses.append((index, smooth))
        if score is not None:
            self.scores.append((index, score))
        self.update()

    def paintEvent(self, event: QPaintEvent | None) -> None:
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        frame = QRectF(4, 18, self.width() - 8, self.height() - 22)
        ink, background = self.palette().text().color(), self.palette().window().color()
        loss_color, iou_color = LOSS.on(background), IOU.on(background)
        ink.setAlpha(90)
        painter.setPen(QPen(ink, 1))
        painter.drawRect(frame)
        if self.losses:
            values = [v for _, v in self.losses]
            low = min(*values, (1 - _LEAST_SPAN) * max(values))  # so that noise is not drawn as a rise
            self._draw(painter, frame, self.losses, low, max(values), loss_color)
            self._write(painter, f"loss {values[-1]:.2g}", loss_color, Qt.AlignmentFlag.AlignLeft)
        if self.scores:
            self._draw(painter, frame, self.scores, 0.0, 1.0, iou_color)
            text = f"validation IoU {self.scores[-1][1]:.3f}"
            self._write(painter, text, iou_color, Qt.AlignmentFlag.AlignRight)
        painter.end()

    def _draw(
        self, painter: QPainter, frame: QRectF, points: list[tuple[int, float]], low: float, high: float, color: QColor
    ) -> None:
        thin = points[:: max(1, len(points) // _MOST_POINTS)]
        x, y = np.array(thin, float).T
        x = frame.left() + x / max(self.total, 1) * frame.width()
        y = frame.bottom() - (y - low) / max(high - low, 1e-9) * frame.height()
        painter.setPen(QPen(color, 2))
        painter.drawPolyline(QPolygonF([QPointF(float(a), float(b)) for a, b in zip(x, y, strict=True)]))

    def _write(self, painter: QPainter, text: str, color: QColor, side: Qt.AlignmentFlag) -> None:
        painter.setPen(color)
        painter.drawText(QRectF(4, 0, self.width() - 8, 16), side | Qt.AlignmentFlag.AlignVCenter, text)

"""distillfss info: what a student or a head file holds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distillfss_core.cli.console import FINE, add_common, format_mb, print_json
from distillfss_core.cli.options import add_engine_options
from distillfss_core.errors import ModelFileError, WeightsUnavailableError

Card = dict[str, Any]


def add_info(commands: Any) -> None:
    """Add the command ``distillfss info`` to the subparsers of the program."""
    parser = commands.add_parser(
        "info",
        help="say what is in a model file",
        description="Say what is in a model, head, backbone or adapter file.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a model, a head, a distilled backbone or adapter")
    add_engine_options(parser.add_argument_group("engine", "how a model would be run here"))
    add_common(parser, _info)


def _info(args: argparse.Namespace) -> int:
    from distillfss_core.models.card import read_card
    from distillfss_core.nn.adapter_file import ADAPTER_FILE, read_adapter_card
    from distillfss_core.nn.backbone_file import read_backbone_card
    from distillfss_core.nn.backbones.weights import BACKBONE_FILE
    from distillfss_core.nn.checkpoint import kind_of
    from distillfss_core.nn.pretrained import HEAD_FILE, read_head_card

    kinds: dict[str | None, tuple[Callable[[Path], Card], Callable[[Card], list[tuple[str, str]]]]] = {
        HEAD_FILE.name: (read_head_card, _head_lines),
        BACKBONE_FILE.name: (read_backbone_card, _backbone_lines),
        ADAPTER_FILE.name: (read_adapter_card, _adapter_lines),
    }
    read, describe = kinds.get(kind_of(args.file), (read_card, _card_lines))
    card = read(args.file)
    try:
        lines = describe(card)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{args.file}: its card is damaged ({type(error).__name__} {error})") from error
    if describe is _card_lines:
        card["engine"] = _engine_lines(args)
        lines += [("engine", text) for text in card["engine"]]
    if args.json:
        print_json(card)
        return FINE
    print(f"{'file':12}{args.file}, {format_mb(card['bytes'])}")
    for name, text in lines:
        print(f"{name:12}{text}")
    return FINE


def _engine_lines(args: argparse.Namespace) -> list[str]:
    """What would run a model here, and why."""
    from distillfss_core.models.student import StudentModel

    try:
        model = StudentModel.load(args.file, device=args.device, precision=args.precision, engine=args.engine)
    except WeightsUnavailableError as error:
        return [f"not known without the weights of the backbone ({error})"]
    return model.explain_engine()


def _card_lines(card: dict[str, Any]) -> list[tuple[str, str]]:
    """A model's card in words."""
    from distillfss_core.models.card import describe_expectation, describe_specialization
    from distillfss_core.models.intensities import Intensities

    head, prepared, training = card["head"], card["preprocess"], card["training"]
    pixel = card["pixel_size_um"]
    lines = [
        ("created", card["created"]),
        ("classes", ", ".join(f"{k} {name}" for k, name in enumerate(card["classes"], 1))),
        ("pixel size", " x ".join(f"{p:g}" for p in pixel) + " um (y x x)" if pixel else "not given"),
        ("backbone", _backbone_text(card)),
        ("form", ", ".join(f"{name} {value}" for name, value in head.items())),
        ("input", f"{prepared['channels']} channel(s), zoom {prepared['zoom']}, intensity by {prepared['scope']}"),
    ]
    if "intensities" in prepared:
        lines.append(("intensities", Intensities.from_json(prepared["intensities"]).range_text))
    if "imported" in training:
        lines.append(("imported", _origin_text(training["imported"])))
    elif training:
        steps = f", {training['steps']} steps, best {training['best_step']}" if training["steps"] else ""
        text = f"{training['method']}{steps}"
        lines.append(("training", f"{text}, {training['seconds']:.0f} s on {training['device']}"))
        if training.get("validation_iou") is not None:
            lines.append(("validation", f"slice {training['validation_slice']}, IoU {training['validation_iou']:.3f}"))
        if specialization := describe_specialization(training):
            lines.append(("specialized", f"{specialization}, {training['specialization']['teacher']} as teacher"))
        if expectation := describe_expectation(training):
            lines.append(("quality", expectation))
        lines.append(("slices", ", ".join(training["support"])))
    return lines


def _head_lines(card: dict[str, Any]) -> list[tuple[str, str]]:
    """A head's card in words."""
    if "imported" in card:
        return [
            ("name", card["name"]),
            ("backbone", _backbone_text(card)),
            ("form", f"{card['preset']}, {card['parameters']} parameters"),
            ("imported", _origin_text(card["imported"])),
        ]
    from distillfss_core.nn.pretrained import head_form

    training, form = card["training"], head_form(card)
    reader = ""
    if form["teacher"] == "uino":
        reader = f", reader {form['uino_reader']}, width {form['uino_width']}, adapter {card['adapter']}"
        reader += f", SAM's mask decoder from {card['sam']}" if "sam" in card else ""
    scores = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in card["scores"].items() if name != "step"]
    return [
        ("name", card.get("name", "")),
        ("backbone", _backbone_text(card)),
        *_distillation_lines(card),
        ("teacher", f"{form['teacher']}{reader}"),
        ("size", f"{card['parameters']} parameters, decoder width {card['width']}"),
        (
            "training",
            f"{training['steps']} steps of {training['settings']['tasks']} tasks, {training['hours']} h on "
            f"{training['device']}",
        ),
        ("held out", ", ".join(scores)),
        *(("data", f"{row['name']} ({row['pictures']} pictures, {row['license']})") for row in card["data"]),
        *(("held out", f"{row['name']} ({row['pictures']} pictures)") for row in card["held_out"]),
    ]


def _distillation_lines(card: dict[str, Any]) -> list[tuple[str, str]]:
    """How the backbone of a head was distilled, if it was."""
    if "distilled" not in card:
        return []
    made = card["distilled"]
    images = f"{made['images']} images of {len(made['sources'])} sets"
    text = f"from {made['teacher']['name']}, {made['steps']} steps on {images}, loss {made['settings']['loss']}"
    return [("distilled", text)]


def _origin_text(origin: dict[str, Any]) -> str:
    """The checkpoint that a file was imported from."""
    fold = "" if origin["fold"] is None else f", fold {origin['fold']}"
    return f"{origin['layout']}{fold}, from {origin['file']}, SHA-256 {origin['sha256']}"


def _backbone_lines(card: dict[str, Any]) -> list[tuple[str, str]]:
    """A distilled backbone's card in words."""
    losses = [f"{name} {value:.4f}" for name, value in card["losses"].items()]
    teacher = card["teacher"]
    return [
        ("backbone", _backbone_text(card)),
        ("teacher", f"{teacher['name']}, weights {teacher['weights']}"),
        ("start", card["start"]),
        ("training", f"{card['steps']} steps on {card['images']} images, {card['seconds']:.0f} s on {card['device']}"),
        ("loss", f"{card['settings']['loss']}; {', '.join(losses)}"),
        *(("images", f"{row['name']} ({row['images']})") for row in card["sources"]),
    ]


def _adapter_lines(card: dict[str, Any]) -> list[tuple[str, str]]:
    """A distilled adapter's card in words."""
    sam = card["sam"]
    return [
        ("backbone", _backbone_text(card)),
        ("SAM", f"{sam['name']}, from {sam['file']}, SHA-256 {sam['digest']}"),
        ("width", str(card["width"])),
        ("training", f"{card['steps']} steps on {card['images']} images, {card['seconds']:.0f} s on {card['device']}"),
        ("loss", f"mean squared error {card['losses']['embedding']:.4f}; sizes {card['settings']['sizes']}"),
        *(("images", f"{row['name']} ({row['images']})") for row in card["sources"]),
    ]


def _backbone_text(card: dict[str, Any]) -> str:
    backbone = card["backbone"]
    inside = "in the file" if card["backbone_inside"] else "not in the file"
    return f"{backbone['name']}, weights {backbone['weights']} ({inside}), license {backbone['license']}"

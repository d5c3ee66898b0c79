"""The commands of the benchmark: accuracy beside the paper, peers on one machine, speed."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillfss_core.cli.console import ERROR, FINE, INTERRUPTED, add_common, positive, print_json, progress, say
from distillfss_core.cli.options import add_overwrite
from distillfss_core.errors import SettingsError

if TYPE_CHECKING:
    from distillfss_core.bench.jobs import Job, Outcome
    from distillfss_core.bench.rows import Machine


FOLDER = "distillfss-bench"
METHODS = ("teacher", "transferfss", "distillfss")
_NEEDED = ("sklearn", "skimage", "scipy", "matplotlib")


def add_bench(commands: Any) -> None:
    """Add the command ``distillfss bench`` and its kinds to the subparsers of the program."""
    parser = commands.add_parser(
        "bench",
        help="measure accuracy and cost, beside the paper and other tools",
        description="Measure accuracy and cost. Figures are kept as they come, so the same command goes on where it "
        "was stopped; figures of another machine, of other pictures or of another version are not mixed with them.",
    )
    kinds = parser.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    _add_accuracy(kinds)
    _add_peers(kinds)
    _add_speed(kinds)


def _add_accuracy(kinds: Any) -> None:
    parser = kinds.add_parser(
        "accuracy",
        help="the data sets of the paper, beside its figures",
        description="Learn from a few pictures of each data set and test on its test part, beside the published "
        "figures. Data sets: nucleus, lung, isic, kvasir, weedmap, pothole, industrial; own: any folder of images and "
        "labels. What must lie in a folder is said where it does not.",
    )
    parser.usage = f"{parser.prog} --data NAME=FOLDER ... [options]"
    _add_data(parser)
    _add_output(parser)
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="supports drawn, seeds 0 to N-1 (3)")
    parser.add_argument(
        "--published-supports", action="store_true", help="one support, by the published rule, in place of draws"
    )
    parser.add_argument(
        "--methods", type=_names, default=METHODS, metavar="NAME,...", help=f"of {', '.join(METHODS)} (default: all)"
    )
    add_common(parser, _accuracy)


def _add_peers(kinds: Any) -> None:
    parser = kinds.add_parser(
        "peers",
        help="other tools on the same pictures, with the same annotations",
        description="Learn the same from the same annotations by several tools, each in a process of its own. Tools "
        "that are not installed are skipped: pip install 'napari-distillfss[bench,peers]' brings all.",
    )
    parser.usage = f"{parser.prog} --data NAME=FOLDER ... [options]"
    _add_data(parser)
    _add_output(parser)
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="seeds 0 to N-1: support, start (3)")
    parser.add_argument(
        "--supports", type=_names, default=("dense", "scribbles"), metavar="KIND,...", help="dense, scribbles (both)"
    )
    parser.add_argument("--baselines", type=_names, metavar="NAME,...", help="which (default: all)")
    add_common(parser, _peers)


def _add_speed(kinds: Any) -> None:
    parser = kinds.add_parser(
        "speed",
        help="backbone, student, teacher and volumes, as ratios of one run",
        description="Time and memory of backbone, student, teacher and the published form, and how they grow with "
        "shots, classes, planes and volumes. Ratios are those of neighboring moments of one run.",
    )
    _add_output(parser)
    parser.add_argument("--device", type=_names, default=("auto",), metavar="NAME,...", help="e.g. cpu,cuda (auto)")
    parser.add_argument("--backbone", default="efficientnet_lite0", metavar="NAME", help="see distillfss backbones")
    parser.add_argument("--side", type=positive, default=512, metavar="N", help="of a plane, pixels (512)")
    parser.add_argument(
        "--sides", type=_numbers, default=(256, 512, 1024), metavar="N,...", help="planes to compare (256,512,1024)"
    )
    parser.add_argument("--shots", type=_numbers, default=(1, 5, 50), metavar="N,...", help="of the teacher (1,5,50)")
    parser.add_argument("--classes", type=_numbers, default=(1, 2, 5), metavar="K,...", help="of the student (1,2,5)")
    parser.add_argument("--planes", type=_numbers, default=(4, 16), metavar="N,...", help="of volumes (4,16)")
    parser.add_argument("--rounds", type=positive, default=9, metavar="N", help="times that all are timed in turn (9)")
    add_common(parser, _speed)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=_data, action="append", required=True, metavar="NAME=FOLDER", help="may be given several times"
    )
    parser.add_argument(
        "--shots", type=_numbers, metavar="N,...", help="annotated pictures (default: few and many, as in the paper)"
    )
    parser.add_argument(
        "--max-test-images", type=positive, metavar="N", help="test pictures at most, spread evenly (all)"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="training steps (default: chosen by the slices)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(FOLDER), metavar="FOLDER", help=f"rows and tables go here ({FOLDER})"
    )
    add_overwrite(parser)


def _accuracy(args: argparse.Namespace) -> int:
    from distillfss_core.bench.supports import PUBLISHED
    from distillfss_core.bench.tables import PUBLISHED_NOTE, accuracy_table

    _check_names(args.methods, METHODS, "methods")
    seeds = [PUBLISHED] if args.published_supports else list(range(args.repeats))
    jobs = _jobs(args, seeds, ("dense",), args.methods)
    return _run(args, "accuracy", jobs, lambda outcomes: f"{accuracy_table(outcomes)}\n\n{PUBLISHED_NOTE}")


def _peers(args: argparse.Namespace) -> int:
    from distillfss_core.bench.jobs import SUPPORT_KINDS
    from distillfss_core.bench.peers import PEERS
    from distillfss_core.bench.tables import peers_tables

    peers = args.baselines or [name for name in PEERS if name != "teacher"]
    _check_names(peers, PEERS, "baselines")
    _check_names(args.supports, SUPPORT_KINDS, "supports")
    return _run(args, "peers", _jobs(args, range(args.seeds), args.supports, peers), peers_tables)


def _jobs(args: argparse.Namespace, seeds: Sequence[int], kinds: Sequence[str], peers: Sequence[str]) -> list[Job]:
    """Seeds outermost: what is stopped early has all peers side by side."""
    _need_packages()
    from distillfss_core.bench.datasets import find_set
    from distillfss_core.bench.jobs import Job

    settings = {"device": args.device} if args.device != "auto" else {}
    settings |= {"steps": args.steps} if args.steps else {}
    sets = [(name, folder, find_set(name)) for name, folder in args.data]
    names = [name for name, _ in args.data]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingsError(f"--data {twice[0]} is given twice; measure one folder after the other")
    for _, folder, dataset in sets:
        dataset.open(folder)  # what is not whole is said before hours of work
    return [
        Job(name, str(folder.resolve()), shots, seed, kind, peer, args.max_test_images, settings)
        for name, folder, dataset in sets
        for seed in seeds
        for shots in args.shots or dataset.shots
        for kind in kinds
        for peer in peers
    ]


def _run(args: argparse.Namespace, name: str, jobs: list[Job], table: Callable[[list[Outcome]], str]) -> int:
    from distillfss_core.bench.jobs import iter_jobs, run_apart
    from distillfss_core.bench.rows import Rows
    from distillfss_core.bench.tables import note
    from distillfss_core.io.writing import check_replaceable, make_folder

    machine = _machine(args.device)
    make_folder(args.output, parents=True)
    goes_on = (args.output / f"{name}.jsonl").exists()
    check_replaceable([args.output / f"{name}.md"], [], overwrite=args.overwrite or goes_on)
    outcomes: list[Outcome] = []
    stopped = False
    with closing(Rows(args.output / f"{name}.jsonl", machine)) as rows, progress(name, len(jobs), "model") as bar:
        try:
            for outcome in iter_jobs(jobs, rows, lambda job: run_apart(job, machine.threads)):
                outcomes.append(outcome)
                bar.update()
                if outcome.error:
                    say(f"warning: {outcome.job.peer} on {outcome.job.data} is left out: {outcome.error}")
        except KeyboardInterrupt:
            stopped = True
            say(f"interrupted; what is finished is kept in {args.output}, and the same command goes on")
    text = f"{table(outcomes)}\n\n{note(machine)}\n"
    _write(args.output / f"{name}.md", text)
    if args.json:
        print_json([o.row or {**o.job.key(), "error": o.error} for o in outcomes])
    else:
        print(text, end="")
    return INTERRUPTED if stopped else FINE if any(o.row for o in outcomes) else ERROR


def _speed(args: argparse.Namespace) -> int:
    _need_packages()
    from distillfss_core.bench.plots import draw_speed
    from distillfss_core.bench.speed import Plan, run_speed, speed_table
    from distillfss_core.io.writing import check_replaceable, make_folder

    make_folder(args.output, parents=True)
    table, figures, *pictures = (args.output / f"speed{suffix}" for suffix in (".md", ".json", ".png", ".svg"))
    check_replaceable([table, figures, *pictures], [], overwrite=args.overwrite)
    plan = Plan(args.backbone, args.side, args.sides, args.shots, args.classes, args.planes, args.rounds)
    reports = []
    for device in args.device:
        with progress(f"speed, {device}", unit="figure") as bar:
            reports.append(run_speed(plan, device, bar.set_postfix_str))
    text = "\n\n".join(speed_table(report) for report in reports) + "\n"
    _write(table, text)
    _write(figures, json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    draw_speed(reports, pictures)
    if args.json:
        print_json([asdict(report) for report in reports])
    else:
        print(text, end="")
    return FINE


def _machine(device: str) -> Machine:
    from distillfss_core.bench.rows import this_machine
    from distillfss_core.nn.device import choose_device

    return this_machine(choose_device(device).name)


def _need_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(f"the benchmark needs {', '.join(missing)}; pip install 'napari-distillfss[bench]'")


def _check_names(names: Sequence[str], valid: Any, option: str) -> None:
    if unknown := [name for name in names if name not in valid]:
        raise SettingsError(f"--{option} has {unknown[0]!r}; choose of {', '.join(valid)}")


def _write(path: Path, text: str) -> None:
    from distillfss_core.io.writing import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _data(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, Path(folder)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of names")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive(part.strip()) for part in text.split(","))

"""Models of the benchmark, learned and judged; rows that are kept; peers that are not there."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from children import crash, imported_while_learning, in_the_child
from distillfss_core.bench import jobs
from distillfss_core.bench.apart import call_apart
from distillfss_core.bench.jobs import Job, Outcome, iter_jobs, run_job
from distillfss_core.bench.peers import PEERS, Peer
from distillfss_core.bench.rows import Machine, Rows
from distillfss_core.bench.tables import accuracy_table, peers_tables, spread
from distillfss_core.errors import DistillFSSError, InputFileError
from distillfss_core.models.segmenter import Segmenter
from layouts import save, write_pairs

MACHINE = Machine("some cpu", 2, 1, "cpu", "2")
FEW = {"steps": 2, "zoom": "1", "crop_size": 64, "queries": 2, "shots": 2, "crops": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_pairs(folder)
    return folder


def job(folder, peer="forest", seed=0, **changes) -> Job:
    return Job("own", str(folder), 2, seed, changes.pop("annotation", "dense"), peer, 2, FEW | changes)


@pytest.mark.parametrize("annotation", ["dense", "scribbles"])
def test_a_forest_learns_squares_and_is_judged(pictures, annotation):
    row = run_job(job(pictures, annotation=annotation))
    assert 0.5 < row["pooled"] <= 1
    assert row["images"] == 2 == row["test_pictures"]
    assert row["seconds"] > 0 < row["seconds_per_megapixel"]
    assert row["peak_mb"] >= row["before_mb"] * 0.5
    assert len(row["support"]) == 2
    assert (row["annotated"] == 1) == (annotation == "dense")
    json.dumps(row)


def test_ours_are_asked_in_the_same_way(pictures, monkeypatch):
    monkeypatch.setattr(Segmenter, "fit_halo", lambda self, image: None)  # takes longer than such a small training
    rows = [run_job(job(pictures, peer)) for peer in ("distillfss", "probe")]
    assert rows[0]["support"] == rows[1]["support"]
    assert all(0 <= row["pooled"] <= 1 for row in rows)


@pytest.mark.parametrize("peer", ["unet", "convpaint-gaussian"])
def test_a_tool_from_elsewhere_answers(pictures, peer):
    if PEERS[peer].missing():
        pytest.skip(f"needs the extra peers: {PEERS[peer].missing()}")
    assert 0 <= run_job(job(pictures, peer))["pooled"] <= 1


@pytest.mark.slow
def test_imports_are_no_part_of_the_seconds_to_learn():
    peers = ["distillfss", "probe", "forest"]  # what each imports the next finds there
    peers += [name for name, peer in PEERS.items() if name not in (*peers, "convpaint-vgg16") and not peer.missing()]
    late = call_apart(imported_while_learning, {"peers": peers, "settings": FEW}, 1)
    heavy = {"timm", "onnx", "onnxruntime", "sklearn", "skimage", "scipy", "segmentation_models_pytorch", "catboost"}
    assert {name: heavy & set(found) for name, found in late.items()} == {name: set() for name in peers}


def test_what_is_not_installed_is_skipped_by_name_and_stops_nothing(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(PEERS, "unet", Peer("U-Net", PEERS["unet"].learn, (("no_such_module", "some-package"),)))
    rows = Rows(tmp_path / "rows.jsonl", MACHINE)
    done = list(iter_jobs([job(pictures, "unet"), job(pictures, "forest")], rows, lambda j: {**j.key(), "pooled": 1}))
    assert done[0].row is None
    assert done[0].error == "not installed: pip install some-package"
    assert done[1].row["pooled"] == 1
    assert done[1].row["machine"]["cpu"] == "some cpu"


def test_figures_that_are_there_are_not_measured_again(pictures, tmp_path):
    asked = []

    def measure(j: Job):
        asked.append(j.seed)
        if j.seed == 1:
            raise DistillFSSError("out of luck")
        return {**j.key(), "pooled": 0.5}

    three = [job(pictures, seed=s) for s in (0, 1, 2)]
    first = Rows(tmp_path / "rows.jsonl", MACHINE)
    assert [o.error for o in iter_jobs(three, first, measure)] == [None, "out of luck", None]
    first.close()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"data": "ow')  # killed while it wrote
    again = Rows(tmp_path / "rows.jsonl", MACHINE)
    assert len(list(again)) == 2
    assert all(o.row for o in iter_jobs(three[::2], again, measure))
    again.add({"data": "x"})
    assert asked == [0, 1, 2]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


def test_figures_of_other_pictures_or_of_another_version_are_not_taken(pictures, tmp_path, monkeypatch):
    def shown(folder, **changes) -> float:
        rows = Rows(tmp_path / "rows.jsonl", MACHINE)
        asked.append(None)
        [done] = iter_jobs([replace(job(folder), **changes)], rows, lambda j: {**j.key(), "pooled": len(asked)})
        rows.close()
        return done.row["pooled"]

    asked: list[None] = []
    for name, count in (("other", 10), ("more", 12)):
        write_pairs(tmp_path / name, count)
    copied = shutil.copytree(pictures, tmp_path / "copied")
    assert [shown(pictures), shown(pictures), shown(copied)] == [1, 1, 1]
    for p in (tmp_path / "other" / "images").glob("*.png"):
        save(p, 255 - np.asarray(Image.open(p)))
    assert [shown(tmp_path / "other"), shown(tmp_path / "other"), shown(pictures)] == [4, 4, 1]
    assert shown(tmp_path / "more", tests=3) == 7
    monkeypatch.setattr(jobs, "__version__", "99")
    assert [shown(pictures), shown(pictures)] == [8, 8]
    monkeypatch.setattr(jobs, "packaged_head", lambda _: None)
    assert [shown(pictures), shown(pictures)] == [10, 10]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 5


def test_figures_of_two_machines_are_not_mixed(tmp_path):
    Rows(tmp_path / "rows.jsonl", MACHINE).add({"pooled": 1})
    with pytest.raises(InputFileError, match=r"some cpu.*another folder"):
        Rows(tmp_path / "rows.jsonl", Machine("another", 2, 1, "cpu", "2"))
    (tmp_path / "other.jsonl").write_text("hello\n")
    with pytest.raises(InputFileError, match="no figures"):
        Rows(tmp_path / "other.jsonl", MACHINE)


def test_a_process_of_its_own_answers_fails_or_falls_over():
    assert call_apart(in_the_child, {"error": False}, 1) == {"threads": "1", "torch": False}
    with pytest.raises(DistillFSSError, match=r"^as expected$"):
        call_apart(in_the_child, {"error": True}, 1)
    with pytest.raises(DistillFSSError, match="code 1: fell over"):
        call_apart(crash, {}, 1)


def row(peer: str, seed: int, pooled: float) -> Outcome:
    made = Job("nucleus", "", 5, seed, "dense", peer, 24)
    figures = {"pooled": pooled, "mean": 0.5, "dice": 0.6, "boundary": 0.7, "seconds": 10.0, "peak_mb": 900}
    figures |= {"seconds_per_megapixel": 0.3, "images": 24, "test_pictures": 133, "annotated": 1.0}
    return Outcome(made, made.key() | figures)


def test_published_figures_stand_beside_ours():
    table = accuracy_table([row("distillfss", 0, 0.7), row("distillfss", 1, 0.8), row("transferfss", 0, 0.75)])
    line = table.splitlines()[-1]
    assert line.startswith("| Nucleus | 5 | seed 0, 1 | 24 of 133 |")
    assert "0.750 (0.700 to 0.800)" in line
    assert "0.7312" in line
    assert line.endswith("| 0.6957 |")
    assert "TransferFSS, published" in table


def test_a_skipped_peer_stands_in_the_table_with_its_reason():
    missing = Outcome(Job("nucleus", "", 5, 0, "dense", "unet", 24), None, "not installed")
    table = peers_tables([row("forest", 0, 0.7), missing])
    assert "| random forest | 0.700 |" in table
    assert "| U-Net on EfficientNet-Lite0 | skipped: not installed |" in table
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_a_spread_has_a_range_where_there_are_several():
    assert spread([0.5]) == "0.500"
    assert spread([0.3, 0.1, 0.2], 1) == "0.2 (0.1 to 0.3)"
    assert spread([None, float("nan")]) == ""

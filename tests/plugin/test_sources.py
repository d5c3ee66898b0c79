"""Annotated slices of other volumes in one support set."""

import os

import numpy as np
import pytest
import tifffile
from napari.layers._source import layer_source
from qtpy.QtCore import Qt

from distillfss_core import IGNORE, DistillFSSError, SupportSetError, open_volume
from napari_distillfss._annotations import Class, file_of
from napari_distillfss._layers import choose_layer, layer_of_file
from napari_distillfss._session import Session

NUCLEUS = (Class("nucleus", "#112233"),)


@pytest.fixture
def session(tmp_path, viewer):
    opened = Session(tmp_path / "kept", lambda: tuple(viewer.layers))
    yield opened
    opened.close()


def annotate(session, layer, labels, planes, *, classes=NUCLEUS, **lead):
    """Choose a volume, paint planes of it, and return the name of its folder."""
    session.choose_volume(choose_layer(layer, lead=lead))
    session.set_classes(classes)
    for z in planes:
        session.annotations.put(z, labels[z])
    session.painted()
    return session.annotations.folder.name


def open_file(viewer, path):
    from napari.layers import Image

    levels, options = layer_of_file(path)
    return viewer.add_layer(Image(levels[0], **options))


@pytest.fixture
def file(tmp_path, sample):
    """A file of the sample with eight times the gray values, and pixels of a micrometer."""
    path = tmp_path / "bright.ome.tif"
    metadata = {"axes": "ZYX", "PhysicalSizeX": 1, "PhysicalSizeY": 1, "PhysicalSizeZ": 2.5}
    tifffile.imwrite(path, sample.image * 8, metadata=metadata)
    return path


def sources(support):
    return [s.source for s in support.slices]


def test_slices_of_another_layer_are_used_on_the_scale_of_this_one(session, viewer, nuclei, sample, painted_truth):
    bright = viewer.add_image(sample.image * 8, name="bright", scale=(2.5, 1, 1), units=("um",) * 3)
    other = annotate(session, bright, painted_truth, [3, 5])
    annotate(session, nuclei, painted_truth, [1])
    assert sources(session.support_maker()()) == ["plane 1"]
    assert [(o.key, o.name) for o in session.others()] == [(other, "bright")]
    session.use_also([other])
    support = session.support_maker()()
    assert sources(support) == ["bright, plane 3", "bright, plane 5", "plane 1"]
    np.testing.assert_allclose(support.slices[0].image, sample.image[3], rtol=0.02, atol=6)
    np.testing.assert_array_equal(support.slices[0].labels, painted_truth[3] - 1)
    assert sources(session.support_maker(with_others=False)()) == ["plane 1"]


def test_a_volume_without_labels_takes_over_classes_and_learns_from_another_alone(
    session, viewer, nuclei, sample, painted_truth
):
    other = annotate(session, nuclei, painted_truth, [2])
    session.choose_volume(choose_layer(viewer.add_image(sample.image[::-1].copy(), name="new")))
    assert not session.has_slices
    session.use_also([other])
    assert session.has_slices
    assert session.annotations.class_names == ("nucleus",)
    assert sources(session.support_maker()()) == ["nuclei, plane 2"]


def test_a_file_that_is_no_longer_open_is_read_again_and_is_named_when_it_is_gone(
    session, viewer, nuclei, file, painted_truth
):
    layer = open_file(viewer, file)
    other = annotate(session, layer, painted_truth, [3, 5])
    annotate(session, nuclei, painted_truth, [1])
    viewer.layers.remove(layer)
    session.use_also([other])
    assert sources(session.support_maker()()) == ["bright.ome.tif, plane 3", "bright.ome.tif, plane 5", "plane 1"]
    file.rename(file.with_name("moved.ome.tif"))
    with pytest.raises(SupportSetError, match=r"^bright\.ome\.tif: is no longer at .*Its 2 slices would be left out"):
        session.support_maker()()
    (used,), missing = session.used()
    assert "is no longer at" in used.problem(("nucleus",), ())
    assert not missing
    file.with_name("moved.ome.tif").rename(file)
    assert len(session.support_maker()()) == 3  # nothing was lost


def test_a_file_has_the_same_annotations_whoever_opens_it(session, viewer, file, painted_truth):
    folder = annotate(session, open_file(viewer, file), painted_truth, [3])
    with layer_source(path=str(file)):  # as napari's File > Open does
        layer = viewer.add_image(tifffile.imread(file), name="bright.ome", scale=(2.5, 1, 1), units=("um",) * 3)
    session.choose_volume(choose_layer(layer))
    assert session.annotations.folder.name == folder
    assert session.annotations.planes() == [3]


def test_a_channel_that_has_a_layer_of_its_own_is_used_beside_the_same_file_as_one_layer(
    session, viewer, sample, painted_truth, tmp_path
):
    image = np.stack([sample.image, sample.image.max() - sample.image], 1)
    path = tmp_path / "two.ome.tif"
    about = {"axes": "ZCYX", "Channel": {"Name": ["DAPI", "GFP"]}}
    tifffile.imwrite(path, image, metadata=about, photometric="minisblack")
    for number in (0, 1):  # as the reader of OME-Zarr splits a file
        (level, *_), options = layer_of_file(path, channel=number)
        viewer.add_image(level, **options | {"name": f"two: {number}"})
    (level, *_), options = layer_of_file(path)
    whole = viewer.add_image(level, **options)
    keys = []
    for number, layer in enumerate(viewer.layers[:2]):
        session.choose_volume(choose_layer(layer))
        session.annotations.put(1 + number, painted_truth[1 + number])
        keys.append(session.annotations.folder.name)
    assert keys[0] != keys[1]
    session.choose_volume(choose_layer(whole, lead={"c": 1}))
    assert session.annotations.folder.name not in keys
    assert sorted(other.name for other in session.others()) == ["two.ome.tif, channel 0", "two.ome.tif, channel 1"]
    session.use_also([keys[1]])
    (labeled,) = session.support_maker()().slices
    np.testing.assert_array_equal(labeled.image, image[2, 1])
    np.testing.assert_array_equal(labeled.labels, painted_truth[2] - 1)


def test_a_file_that_has_changed_is_not_paired_with_the_old_labels(session, viewer, nuclei, file, painted_truth):
    layer = open_file(viewer, file)
    other = annotate(session, layer, painted_truth, [3])
    annotate(session, nuclei, painted_truth, [1])
    viewer.layers.remove(layer)
    session.use_also([other])
    tifffile.imwrite(file, np.zeros((8, 96, 96), np.uint16), metadata={"axes": "ZYX"})
    os.utime(file, (1, 1))
    with pytest.raises(SupportSetError, match="has changed since it was annotated"):
        session.support_maker()()


def test_a_layer_in_memory_that_is_closed_is_named(session, viewer, nuclei, sample, painted_truth):
    held = viewer.add_image(sample.image * 2, name="in memory", scale=(2.5, 1, 1), units=("um",) * 3)
    other = annotate(session, held, painted_truth, [3])
    annotate(session, nuclei, painted_truth, [1])
    session.use_also([other])
    viewer.layers.remove(held)
    with pytest.raises(SupportSetError, match="in memory: is no file, and not open here"):
        session.support_maker()()
    viewer.add_image(sample.image * 2, name="in memory", scale=(2.5, 1, 1), units=("um",) * 3)
    assert len(session.support_maker()()) == 2
    viewer.layers[-1].data = sample.image * 3
    with pytest.raises(SupportSetError, match="in memory: has changed"):
        session.support_maker()()


def test_what_is_used_is_known_after_a_restart_and_a_lost_folder_is_named(
    session, viewer, nuclei, sample, painted_truth
):
    import shutil

    another = viewer.add_image(sample.image[::-1].copy(), name="another", scale=(2.5, 1, 1), units=("um",) * 3)
    other = annotate(session, another, painted_truth, [3])
    annotate(session, nuclei, painted_truth, [1])
    session.use_also([other])
    session.close()
    again = Session(session.folder, session.layers)
    again.choose_volume(choose_layer(nuclei))
    assert sources(again.support_maker()()) == ["another, plane 3", "plane 1"]
    shutil.rmtree(again.annotations.folder.with_name(other))
    with pytest.raises(SupportSetError, match=f"the annotations {other} are no longer in"):
        again.support_maker()()
    again.close()


def test_classes_are_matched_by_name_and_a_missing_one_is_named(session, viewer, nuclei, sample, painted_truth):
    both = (Class("debris", "#445566"), *NUCLEUS)
    another = viewer.add_image(sample.image[::-1].copy(), name="another", scale=(2.5, 1, 1), units=("um",) * 3)
    other = annotate(session, another, painted_truth, [3])  # label 2 is the nucleus
    annotate(session, nuclei, np.where(painted_truth == 2, 3, painted_truth), [1], classes=both)
    session.annotations.put(2, np.full((96, 96), 2, np.uint8))
    session.use_also([other])
    support = session.support_maker()()
    assert support.class_names == ("debris", "nucleus")
    first = next(s for s in support.slices if s.source == "another, plane 3")
    np.testing.assert_array_equal(first.labels, np.where(painted_truth[3] == 2, 2, 0))
    session.set_classes(both[:1])
    with pytest.raises(SupportSetError, match="another: has the class 'nucleus', which this volume has not"):
        session.support_maker()()


def test_time_points_use_the_slices_of_those_before_and_channels_do_not(session, viewer, sample, painted_truth):
    series = np.stack([np.stack([sample.image] * 2)] * 3)
    layer = viewer.add_image(series, name="series", axis_labels=("t", "c", "z", "y", "x"))
    folder = annotate(session, layer, painted_truth, [1], t=0, c=0)
    session.choose_volume(choose_layer(layer, lead={"t": 2, "c": 0}))
    assert session.annotations.also == (folder,)
    assert not session.annotations.folder.joinpath("notes.json").exists()  # nothing is painted here
    session.annotations.put(4, painted_truth[4])
    assert sources(session.support_maker()()) == ["plane 4", "series, time 0, channel 0, plane 1"]
    session.choose_volume(choose_layer(layer, lead={"t": 2, "c": 1}))
    assert session.annotations.also == ()


def test_slices_of_the_same_name_have_files_of_their_own(session, viewer, nuclei, sample, painted_truth):
    keys = []
    for gain in (2, 3):
        layer = viewer.add_image(sample.image * gain, name="stack", scale=(2.5, 1, 1), units=("um",) * 3)
        layer.metadata["distillfss_name"] = "stack"
        keys.append(annotate(session, layer, painted_truth, [gain]))
    annotate(session, nuclei, painted_truth, [1])
    session.use_also(keys)
    names = sources(session.support_maker()())
    assert names == ["plane 1", "stack (2), plane 3", "stack, plane 2"]
    assert len({file_of(name) for name in names}) == 3


@pytest.mark.parametrize(
    ("name", "file"),
    [("plane 3", "plane_0003.tif"), ("b c.tif, time 2, plane 12", "b_c.tif__time_2_plane_0012.tif")],
)
def test_files_of_slices_are_named_after_their_source(name, file):
    assert file_of(name) == file


def test_a_slice_without_labels_teaches_nothing_and_disabled_ones_stay_out(session, viewer, nuclei, painted_truth):
    partial = painted_truth.copy()
    partial[3, :50] = 0
    another = viewer.add_image(np.asarray(nuclei.data)[::-1].copy(), name="another")
    other = annotate(session, another, partial, [3, 5])
    session.annotations.enable(5, False)
    session.choose_volume(choose_layer(nuclei))
    session.use_also([other])
    (slice_,) = session.support_maker()().slices
    assert (slice_.labels[:50] == IGNORE).all()
    assert (slice_.labels[50:] != IGNORE).all()


def test_the_dock_lists_and_learns_from_slices_of_two_volumes(
    viewer, nuclei, sample, painted_truth, open_dock, few, qtbot, monkeypatch
):
    from distillfss_core import load_support
    from napari_distillfss._widgets import support as support_section

    bright = viewer.add_image(sample.image * 8, name="bright", scale=(2.5, 1, 1), units=("um",) * 3)
    dock = open_dock(viewer)
    dock.distill.settings.setValue(few)

    def choose(index):
        dock.volume.layers.setCurrentIndex(index)
        dock.volume.layers.activated.emit(index)

    choose(1)
    dock.session.annotations.put(3, painted_truth[3])
    dock.session.painted()
    choose(0)
    dock.session.annotations.put(1, painted_truth[1])
    dock.session.painted()
    asked = []

    def ask(parent, others, used):
        asked.append([(other.name, problem) for other, problem in others])
        return (others[0][0].key,)

    monkeypatch.setattr(support_section, "ask_for_sources", ask)
    dock.support.also.click()
    assert asked == [[("bright", "")]]
    rows = [dock.support.list.item(n).text().splitlines()[0] for n in range(dock.support.list.count())]
    assert rows == ["plane 1: 100 % labeled", "bright, plane 3: 100 % labeled"]
    dock.support.list.itemClicked.emit(dock.support.list.item(1))
    assert "It is of another volume" in dock.support.message.text()
    dock.distill.start()
    qtbot.waitUntil(lambda: not dock.session.busy, timeout=180_000)
    assert dock.session.model.training["support"] == ["bright, plane 3", "plane 1"]
    folder = dock.session.training.support
    again = load_support(folder / "images", folder / "labels", classes=["object"], scribbles=True, same_volume=True)
    assert sources(again) == ["bright_plane_0003.tif", "plane_0001.tif"]
    np.testing.assert_allclose(again.slices[0].image, sample.image[3], rtol=0.02, atol=6)
    viewer.layers.remove(bright)
    last = dock.support.list.item(dock.support.list.count() - 1).text()
    assert last == "bright: 1 slice cannot be used\nit is no file, and not open here"
    before = dock.session.model
    dock.distill.start()
    qtbot.waitUntil(lambda: not dock.session.busy, timeout=180_000)
    assert "bright: is no file, and not open here. Its 1 slice would be left out" in dock.distill.message.text()
    assert dock.session.model is before


def test_a_volume_that_cannot_be_used_cannot_be_ticked(qtbot, session, viewer, nuclei, sample, painted_truth):
    from napari_distillfss._widgets.sources import SourceList

    another = viewer.add_image(sample.image[::-1].copy(), name="another")
    keys = [annotate(session, another, painted_truth, [3]), annotate(session, nuclei, painted_truth, [1])]
    session.choose_volume(None)
    session.choose_volume(choose_layer(viewer.add_image(sample.image[:4].copy(), name="third")))
    others = {other.key: other for other in session.others()}
    choice = SourceList([(others[keys[0]], ""), (others[keys[1]], "is no file")])
    qtbot.addWidget(choice)
    told = []
    choice.valueChanged.connect(told.append)
    choice.list.item(1).setCheckState(Qt.CheckState.Checked)
    assert choice.value() == ()
    choice.list.item(0).setCheckState(Qt.CheckState.Checked)
    assert told[-1] == choice.value() == (keys[0],)
    choice.setValue(())
    assert choice.value() == ()
    assert choice.list.item(1).text().endswith("it is no file")


def test_damaged_notes_of_another_volume_do_no_harm(session, viewer, nuclei, sample, painted_truth):
    another = viewer.add_image(sample.image[::-1].copy(), name="another")
    other = annotate(session, another, painted_truth, [3])
    annotate(session, nuclei, painted_truth, [1])
    (session.annotations.folder.with_name(other) / "notes.json").write_text("{")
    assert session.others() == []
    session.use_also([other])
    with pytest.raises(DistillFSSError, match="are no longer in"):
        session.support_maker()()


def test_the_file_of_a_volume_opens_the_same_voxels(file, viewer, session, painted_truth):
    annotate(session, open_file(viewer, file), painted_truth, [3])
    record = session.annotations.notes.get("volume") or session.volume.record
    np.testing.assert_array_equal(
        open_volume(record["location"], **record["opening"]).plane(3), tifffile.imread(file)[3]
    )


def test_a_slice_of_another_volume_is_left_out_singly_and_after_a_restart(
    session, viewer, nuclei, sample, painted_truth
):
    bright = viewer.add_image(sample.image * 8, name="bright", scale=(2.5, 1, 1), units=("um",) * 3)
    other = annotate(session, bright, painted_truth, [3, 5])
    annotate(session, nuclei, painted_truth, [1])
    session.use_also([other])
    session.leave_out(other, 3)
    assert sources(session.support_maker()()) == ["bright, plane 5", "plane 1"]
    session.close()
    again = Session(session.folder, session.layers)
    again.choose_volume(choose_layer(nuclei))
    assert sources(again.support_maker()()) == ["bright, plane 5", "plane 1"]
    again.leave_out(other, 5)
    assert sources(again.support_maker()()) == ["plane 1"]
    viewer.layers.remove(bright)
    assert sources(again.support_maker()()) == ["plane 1"]  # nothing is needed of it
    viewer.layers.append(bright)
    again.leave_out(other, 3, False)
    assert sources(again.support_maker()()) == ["bright, plane 3", "plane 1"]
    again.choose_volume(choose_layer(bright))
    assert again.annotations.enabled() == [3, 5]  # there all are used
    again.close()


def test_a_time_point_that_was_unticked_stays_so(session, viewer, sample, painted_truth):
    layer = viewer.add_image(np.stack([sample.image] * 4), name="series", axis_labels=("t", "z", "y", "x"))

    def go_to(time):
        session.choose_volume(choose_layer(layer, lead={"t": time}))

    folders = [annotate(session, layer, painted_truth, [1], t=time) for time in (0, 1)]
    assert session.annotations.also == (folders[0],)
    go_to(2)
    assert set(session.annotations.also) == set(folders)
    session.leave_out(folders[1], 1)
    session.use_also([folders[1]])
    for time in (1, 2, 0, 2):
        go_to(time)
    assert session.annotations.also == (folders[1],)
    assert session.annotations.left_out(folders[1]) == {1}
    go_to(3)  # as at the time before
    assert session.annotations.also == (folders[1],)
    assert session.annotations.left_out(folders[1]) == {1}
    go_to(0)
    go_to(3)
    assert session.annotations.also == (folders[1],)
    session.use_also(folders)
    session.close()
    session.choose_volume(choose_layer(layer, lead={"t": 1}))
    go_to(3)
    assert set(session.annotations.also) == set(folders)


def test_the_dock_shows_thumbnails_of_other_volumes_and_unticks_their_slices(
    viewer, nuclei, sample, painted_truth, open_dock, qtbot
):
    bright = viewer.add_image(sample.image * 8, name="bright", scale=(2.5, 1, 1), units=("um",) * 3)
    dock = open_dock(viewer)
    for index, planes in ((1, (3, 5)), (0, (1,))):
        dock.volume.layers.setCurrentIndex(index)
        dock.volume.layers.activated.emit(index)
        for z in planes:
            dock.session.annotations.put(z, painted_truth[z])
        dock.session.painted()
    key = dock.session.others()[0].key
    dock.session.use_also([key])
    rows = dock.support.list
    qtbot.waitUntil(lambda: not rows.busy, timeout=60_000)
    icons = [rows.item(n).icon().pixmap(48).toImage() for n in range(3)]
    assert all(not image.isNull() for image in icons)
    assert icons[1] != icons[2]
    assert icons[1] == icon_of(dock, qtbot, 1, 3)  # as where the volume is on screen
    dock.volume.layers.setCurrentIndex(0)
    dock.volume.layers.activated.emit(0)
    strokes = []
    dock.session.stroked.connect(lambda: strokes.append(1))
    rows.item(1).setCheckState(Qt.CheckState.Unchecked)
    assert sources(dock.session.support_maker()()) == ["bright, plane 5", "plane 1"]
    assert strokes
    dock.session.slices_changed.emit()
    assert [rows.item(n).checkState() == Qt.CheckState.Checked for n in range(3)] == [True, False, True]
    dock.session.leave_out(key, 5)
    viewer.layers.remove(bright)
    assert rows.item(1).text() == "bright: 0 slices cannot be used\nit is no file, and not open here"


def icon_of(dock, qtbot, index, plane):
    """Thumbnail of a slice of the volume with this place in the list of layers."""
    dock.volume.layers.setCurrentIndex(index)
    dock.volume.layers.activated.emit(index)
    rows = dock.support.list
    qtbot.waitUntil(lambda: not rows.busy, timeout=60_000)
    (row,) = (n for n in range(rows.count()) if rows.item(n).text().startswith(f"plane {plane}:"))
    return rows.item(row).icon().pixmap(48).toImage()

"""What is painted is kept."""

import os
import platform

import numpy as np
import pytest

from distillfss_core import IGNORE, DistillFSSError
from napari_distillfss._annotations import (
    Annotations,
    Class,
    folder_for,
    from_classes,
    painted_from,
    set_aside,
    to_classes,
)


def make(folder, shape=(4, 20, 30)):
    index = {3: lambda z: (z,), 4: lambda z: (0, z), 2: lambda z: ()}[len(shape)]
    return Annotations(folder, shape, index)


@pytest.mark.parametrize("shape", [(4, 20, 30), (1, 4, 20, 30)])
def test_what_was_painted_is_found_again_after_a_crash(tmp_path, shape):
    first = make(tmp_path / "a", shape)
    first.array[first.index(2)] = np.tile([0, 1, 2], 200).reshape(20, 30)
    first.classes = (Class("nucleus", "#112233"), Class("debris", "#445566"))
    first.enable(2, False)
    again = make(tmp_path / "a", shape)  # nothing was closed
    assert again.planes() == [2]
    assert again.class_names == ("nucleus", "debris")
    (slice_,) = again.slices()
    assert not slice_.enabled
    assert slice_.annotated == pytest.approx(2 / 3)
    assert slice_.share(2) == pytest.approx(1 / 2)


def test_a_single_plane_is_plane_0(tmp_path):
    painted = make(tmp_path / "a", (20, 30))
    assert painted.planes() == []
    painted.put(0, np.ones((20, 30), np.uint8))
    assert painted.planes() == [0]
    painted.remove(0)
    assert painted.planes() == []


def test_annotations_in_use_are_not_given_to_another(tmp_path):
    first = folder_for(tmp_path, "nuclei", {"kind": "array"}, (4, 20, 30))
    painted = make(first)
    assert folder_for(tmp_path, "nuclei", {"kind": "array"}, (4, 20, 30)) != first
    painted.close()
    assert folder_for(tmp_path, "nuclei", {"kind": "array"}, (4, 20, 30)) == first


def test_annotations_of_a_process_that_died_are_free(tmp_path):
    first = folder_for(tmp_path, "nuclei", {}, (4, 20, 30))
    make(first)
    for line in (f"{2**22 + 1} 0.00 here", f"{os.getpid()} 0.00 {platform.node()}", "1 1.00 another-machine", "x", ""):
        (first / "owner").write_text(line)  # no such process, or one that got its number since
        assert folder_for(tmp_path, "nuclei", {}, (4, 20, 30)) == first


def test_beginning_anew_deletes_nothing(tmp_path):
    make(tmp_path / "a").put(0, np.ones((20, 30), np.uint8))
    set_aside(tmp_path / "a")
    assert make(tmp_path / "a").planes() == []
    assert make(tmp_path / "a.old1").planes() == [0]


def test_annotations_of_before_keep_their_colors(tmp_path):
    make(tmp_path / "a").classes = (Class("cell", "#123456"),)
    notes = tmp_path / "a" / "notes.json"
    assert '"color"' in notes.read_text()
    notes.write_text(notes.read_text().replace('"color"', '"colour"'))
    assert make(tmp_path / "a").classes == (Class("cell", "#123456"),)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DistillFSSError, match="cannot be kept"):
        make(tmp_path / "a")


def test_a_file_where_the_folder_should_be_is_one_sentence(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(DistillFSSError, match="cannot be kept"):
        make(tmp_path / "a")


def test_painted_labels_are_the_cores_and_back():
    painted = np.array([[0, 1, 2, 3]], np.uint8)
    np.testing.assert_array_equal(to_classes(painted), [[IGNORE, 0, 1, 2]])
    np.testing.assert_array_equal(from_classes(to_classes(painted)), painted)


@pytest.mark.parametrize(
    ("kind", "numbers", "painted"),
    [("masks", [0, 7, 300], [1, 2, 2]), ("classes", [0, 1, 2], [1, 2, 3]), ("scribbles", [0, 1, 3], [0, 1, 3])],
)
def test_numbers_of_a_label_file_are_read_as_they_are_meant(kind, numbers, painted):
    np.testing.assert_array_equal(painted_from(np.array(numbers), kind, 2, "file"), painted)


def test_a_number_that_stands_for_no_class_is_one_sentence():
    with pytest.raises(DistillFSSError, match="label 9"):
        painted_from(np.array([0, 9]), "classes", 2, "file")


def test_a_folder_in_which_nothing_was_kept_goes(tmp_path):
    make(tmp_path / "none").close()
    assert not (tmp_path / "none").exists()
    painted = make(tmp_path / "some")
    assert painted.planes() == []
    assert not painted.plane(2).any()
    painted.put(2, np.ones((20, 30), np.uint8))
    painted.close()
    assert make(tmp_path / "some").planes() == [2]


def test_what_others_write_into_a_plane_is_counted_anew(tmp_path):
    painted = make(tmp_path / "a")
    painted.put(2, np.ones((20, 30), np.uint8))
    assert painted.counts(2)[1] == 600
    painted.array[2, :10] = 2
    assert painted.counts(2)[:3].tolist() == [0, 300, 300]


def test_planes_are_not_read_again_when_they_are_opened(tmp_path, monkeypatch):
    first = make(tmp_path / "a")
    first.put(1, np.ones((20, 30), np.uint8))
    first.put(3, np.tile(np.uint8([0, 1, 2, 200]), 150).reshape(20, 30))
    assert first.planes() == [1, 3]
    first.close()
    again = make(tmp_path / "a")
    read = []
    plane = Annotations.plane
    monkeypatch.setattr(Annotations, "plane", lambda self, z: read.append(z) or plane(self, z))
    assert again.planes() == [1, 3]
    assert again.counts(3)[[0, 1, 2, 200]].tolist() == [150] * 4
    assert not read
    again.array[3, 10:] = 0
    assert again.counts(3)[:3].tolist() == [375, 75, 75]
    assert read == [3]
    again.close()


def test_counts_that_cannot_be_read_are_made_again(tmp_path):
    first = make(tmp_path / "a")
    first.put(1, np.ones((20, 30), np.uint8))
    assert first.planes() == [1]
    first.close()
    for text in ("", "[]", '{"1": [[[1, 2, 3]], [5]]}', '{"one": 1}'):
        (tmp_path / "a" / "counts.json").write_text(text)
        again = make(tmp_path / "a")
        assert again.counts(1)[1] == 600
        again.array.is_written_later = False
    again.remove(1)
    again.close()
    assert not (tmp_path / "a" / "counts.json").exists()

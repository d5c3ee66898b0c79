"""OME-Zarr at https:// and s3:// addresses, as public archives serve it."""

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from distillfss_core import (
    InputFileError,
    SettingsError,
    axis_sizes,
    load_support,
    open_volume,
    plan_batch,
    segment_to_zarr,
)
from distillfss_core.cli.console import ERROR, FINE
from distillfss_core.cli.main import main
from distillfss_core.volumes import remote
from distillfss_core.volumes.remote import address_of
from servers import fail_times, serve_http, serve_s3
from volumes import noise, write_ome_zarr

pytest.importorskip("aiohttp", reason="needs aiohttp: pip install aiohttp")
pytest.importorskip("fsspec", reason="needs fsspec: pip install fsspec")

IMAGE = noise((4, 40, 36))


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture
def server(tmp_path):
    with serve_http(tmp_path) as server:
        yield server


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize(("version", "shards"), [("0.4", None), ("0.5", None), ("0.5", (2, 40, 36))])
def test_an_image_on_a_server_is_read_as_from_disk(tmp_path, version, shards, has_ranges):
    """A user opens an image of a public archive; some servers send whole files where parts are requested."""
    path = write_ome_zarr(
        tmp_path / "a.ome.zarr", IMAGE, version=version, shards=shards, chunks=(1, 20, 18), scale=(2, 0.5, 0.5)
    )
    with serve_http(tmp_path, has_ranges=has_ranges) as server:
        address = f"{server.address}/a.ome.zarr"
        here, there = open_volume(path, level=1), open_volume(address, level=1)
        assert not any(name in part for part in server.requests for name in ("/c/", "/0.0", "/0/0/0"))
        np.testing.assert_array_equal(there[:], IMAGE[:, ::2, ::2])
        assert (there.scale, there.unit, there.levels) == (here.scale, here.unit, here.levels)
        assert there.identity == here.identity
        assert axis_sizes(address) == axis_sizes(path)
        assert (there.name, there.location, there.path) == (address, address, None)
        np.testing.assert_array_equal(open_volume(Path(address))[1:3, 4:9], IMAGE[1:3, 4:9])
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(there))[:], IMAGE[:, ::2, ::2])


def test_only_the_chunks_of_a_plane_are_requested(tmp_path, server):
    """A user looks at one plane of a volume of terabytes."""
    write_ome_zarr(tmp_path / "a.zarr", IMAGE, chunks=(1, 20, 36), levels=1)
    volume = open_volume(f"{server.address}/a.zarr")
    server.requests.clear()
    volume.plane(2)
    assert sorted(server.requests) == ["/a.zarr/0/c/2/0/0", "/a.zarr/0/c/2/1/0"]


@pytest.mark.parametrize("failure", ["drop", "cut", 503, 429])
def test_a_dropped_connection_is_repeated(tmp_path, server, failure):
    """A user reads over a network that drops connections, or from a server that is busy."""
    write_ome_zarr(tmp_path / "a.zarr", IMAGE, shards=(2, 40, 36), chunks=(1, 20, 18))
    server.fail = fail_times(2, failure)
    volume = open_volume(f"{server.address}/a.zarr")
    np.testing.assert_array_equal(volume[:], IMAGE)
    assert not volume.missing


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["drop", "cut", 500])
def test_a_connection_that_stays_down_is_an_error_with_the_address(tmp_path, server, failure):
    """A user loses the connection while a volume is read."""
    write_ome_zarr(tmp_path / "a.zarr", IMAGE, levels=1)
    volume = open_volume(f"{server.address}/a.zarr")
    server.fail = fail_times(100, failure)
    pattern = rf"^{server.address}/a\.zarr/0/c/.*: cannot be read, 4 requests failed .*check the connection"
    with pytest.raises(InputFileError, match=pattern):
        volume.plane(0)
    server.fail = lambda path: None
    np.testing.assert_array_equal(volume.plane(0), IMAGE[0])


def test_a_connection_that_goes_down_while_the_metadata_are_read_is_an_error_of_the_network(tmp_path, server):
    """A user loses the connection while a volume is opened."""
    write_ome_zarr(tmp_path / "a.zarr", IMAGE)
    server.fail = fail_times(100, "drop", "/1/zarr.json")
    with pytest.raises(InputFileError, match=rf"^{server.address}/a\.zarr/1/zarr\.json: cannot be read, 4 requests"):
        open_volume(f"{server.address}/a.zarr", level=1)
    server.fail = lambda path: None
    volume = open_volume(f"{server.address}/a.zarr")
    server.fail = fail_times(100, "drop", "/c/")
    with pytest.raises(InputFileError, match=rf"^{server.address}/a\.zarr/0/c/.*: cannot be read, 4 requests"):
        _ = volume.identity


def test_what_is_not_there_is_an_error_with_the_address(tmp_path, server, capsys):
    """A user mistypes an address, or gives one of another kind."""
    write_ome_zarr(tmp_path / "a.zarr", IMAGE)
    with pytest.raises(InputFileError, match=rf"^{server.address}/b\.zarr: no zarr is there; check the address"):
        open_volume(f"{server.address}/b.zarr")
    with pytest.raises(InputFileError, match=r"^http://127\.0\.0\.1:9/b\.zarr.*cannot be read, 4 requests failed"):
        open_volume("http://127.0.0.1:9/b.zarr")
    with pytest.raises(SettingsError, match=r"cannot read ftp://; give https:// or s3://"):
        open_volume("ftp://host/a.zarr")
    with pytest.raises(SettingsError, match=r"has no level 5; its levels are 0 to 1"):
        open_volume(f"{server.address}/a.zarr", level=5)
    server.fail = fail_times(100, 403)
    with pytest.raises(InputFileError, match=r"/a\.zarr: access is denied, or nothing is there"):
        open_volume(f"{server.address}/a.zarr")
    server.fail = lambda path: None
    command = ["instances", f"{server.address}/b.zarr", "-o", str(tmp_path / "o.ome.zarr")]
    assert main(command) == ERROR
    assert capsys.readouterr().err.startswith(f"distillfss: error: {server.address}/b.zarr: no zarr is there")


@pytest.mark.parametrize("absent", [404, 403])
def test_a_chunk_that_is_not_on_the_server_is_counted(tmp_path, server, caplog, absent):
    """A user reads an upload that is not complete; stores of S3 answer 403 for what is not there."""
    path = write_ome_zarr(tmp_path / "a.zarr", IMAGE + 1, chunks=(1, 40, 36), levels=1)
    (path / "0" / "c" / "2" / "0" / "0").unlink()
    server.fail = lambda path: absent if "/c/2" in path else None
    volume = open_volume(f"{server.address}/a.zarr")
    with caplog.at_level(logging.WARNING):
        assert not volume[2].any()
    assert volume[1].all()
    assert volume.missing == {"c/2/0/0"}
    assert "1 of 1 chunks asked for have no file" in caplog.text


def test_labels_of_a_volume_on_a_server_are_those_of_the_file(tmp_path, server, capsys, plain_student):
    """A user segments, learns from and compares volumes on a server."""
    path = write_ome_zarr(tmp_path / "a.zarr", noise((2, 64, 64), "u1"))
    labels = write_ome_zarr(tmp_path / "l.zarr", (noise((2, 64, 64), "u1", 1) > 120).astype(np.uint8))
    for name, source in (("file", path), ("server", f"{server.address}/a.zarr")):
        segment_to_zarr(open_volume(source), plain_student, tmp_path / f"{name}.ome.zarr")
    results = [zarr.open_array(tmp_path / f"{name}.ome.zarr" / "0", mode="r")[:] for name in ("file", "server")]
    np.testing.assert_array_equal(*results)
    attributes = json.loads((tmp_path / "server.ome.zarr" / "zarr.json").read_text())["attributes"]
    assert attributes["distillfss"]["volume"]["path"] == f"{server.address}/a.zarr"
    assert attributes["ome"]["image-label"]["source"]["image"] == f"{server.address}/a.zarr"
    support = load_support(f"{server.address}/a.zarr", f"{server.address}/l.zarr", planes=[1])
    np.testing.assert_array_equal(support.slices[0].image, noise((2, 64, 64), "u1")[1])
    assert main(["evaluate", f"{server.address}/l.zarr", str(labels), "--json"]) == FINE
    assert json.loads(capsys.readouterr().out)["iou"] == 1
    plain_student.save(tmp_path / "m.safetensors")
    command = ["segment", f"{server.address}/a.zarr", "-m", tmp_path / "m.safetensors", "-o", tmp_path / "o.tif"]
    assert main([*map(str, command)]) == ERROR
    assert f"{server.address}/a.zarr is a volume; end OUT in .ome.zarr" in capsys.readouterr().err


def test_a_plate_and_a_table_of_addresses_are_planned(tmp_path, server):
    """A user gives batch a plate of a public screen, or a table of addresses."""
    for k, field in enumerate(("A/1/0", "A/1/1")):
        write_ome_zarr(tmp_path / "p.zarr" / field, IMAGE + k, version="0.4")
    for part, attributes in (
        ("p.zarr", {"plate": {"wells": [{"path": "A/1"}]}}),
        ("p.zarr/A/1", {"well": {"images": [{"path": "0"}, {"path": "1"}]}}),
    ):
        (tmp_path / part / ".zgroup").write_text('{"zarr_format": 2}')
        (tmp_path / part / ".zattrs").write_text(json.dumps(attributes))
    jobs = plan_batch(Path(f"{server.address}/p.zarr"), tmp_path, {})
    assert [job.output.name for job in jobs] == ["p_A_1_0.ome.zarr", "p_A_1_1.ome.zarr"]
    np.testing.assert_array_equal(open_volume(jobs[1].source)[:], IMAGE + 1)
    (tmp_path / "t.csv").write_text(f"volume\n{server.address}/p.zarr/A/1/1\n")
    (job,) = plan_batch(tmp_path / "t.csv", tmp_path, {})
    assert open_volume(job.source).name == f"{server.address}/p.zarr/A/1/1"
    with pytest.raises(InputFileError, match=rf"e\.g\. {server.address}/p\.zarr/A/1/0"):
        open_volume(f"{server.address}/p.zarr")


def test_a_collection_on_a_server_lists_its_images(tmp_path, server):
    """A user gives the address of what bioformats2raw wrote."""
    for name in ("0", "1"):
        write_ome_zarr(tmp_path / "c.zarr" / name, IMAGE + int(name), version="0.4")
    for part, attributes in (("c.zarr", {"bioformats2raw.layout": 3}), ("c.zarr/OME", {"series": ["0", "1"]})):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / ".zgroup").write_text('{"zarr_format": 2}')
        (tmp_path / part / ".zattrs").write_text(json.dumps(attributes))
    np.testing.assert_array_equal(open_volume(f"{server.address}/c.zarr", series=1)[:], IMAGE + 1)
    with pytest.raises(
        InputFileError, match=rf"2 images \(0, 1\); give the path of one, e\.g\. {server.address}/c\.zarr/0"
    ):
        open_volume(f"{server.address}/c.zarr")


# S3


@pytest.fixture
def s3(monkeypatch, tmp_path):
    """A client of a server of S3 with a bucket called "archive"; the process uses that server without credentials."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install s3fs")
    with serve_s3() as address:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        boto3 = pytest.importorskip("boto3", reason="needs boto3: pip install boto3")
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
        client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="archive")
        remote._file_system.cache_clear()
        yield client
        remote._file_system.cache_clear()


def upload(client, folder: Path, acl: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            key = f"{folder.name}/{file.relative_to(folder).as_posix()}"
            client.put_object(Bucket="archive", Key=key, Body=file.read_bytes(), ACL=acl)


def test_a_public_bucket_is_read_without_credentials(tmp_path, s3):
    """A user opens an image of a public bucket."""
    upload(s3, write_ome_zarr(tmp_path / "a.zarr", IMAGE, shards=(2, 40, 36), chunks=(1, 20, 18)), "public-read")
    volume = open_volume("s3://archive/a.zarr", level=1)
    np.testing.assert_array_equal(volume[:], IMAGE[:, ::2, ::2])
    assert volume.location == "s3://archive/a.zarr"
    with pytest.raises(InputFileError, match=r"^s3://archive/b\.zarr: no zarr is there|access is denied"):
        open_volume("s3://archive/b.zarr")


def test_a_private_bucket_is_read_with_the_credentials_of_the_user(tmp_path, s3, monkeypatch):
    """A user opens an image of the own group."""
    upload(s3, write_ome_zarr(tmp_path / "a.zarr", IMAGE), "private")
    with pytest.raises(InputFileError, match=r"^s3://archive/a\.zarr: access is denied, or nothing is there"):
        open_volume("s3://archive/a.zarr")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    remote._file_system.cache_clear()
    np.testing.assert_array_equal(open_volume("s3://archive/a.zarr")[:], IMAGE)


# addresses


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("https://host/a/b.zarr/", "https://host/a/b.zarr"),
        (Path("https://host/b.zarr"), "https://host/b.zarr"),
        ("S3://bucket/b.zarr", "s3://bucket/b.zarr"),
        ("a/b.zarr", None),
        (Path("/data/b.zarr"), None),
        ("C:/data/b.zarr", None),
    ],
)
def test_addresses_are_recognized(source, address):
    """A user gives an address as text, or as a path, which has lost a slash."""
    assert address_of(source) == address


def test_a_file_with_the_name_of_a_scheme_is_a_file(tmp_path, monkeypatch):
    """A user has a folder called s3: on disk."""
    (tmp_path / "s3:").mkdir()
    tifffile.imwrite(tmp_path / "s3:" / "a.tif", IMAGE[0])
    monkeypatch.chdir(tmp_path)
    assert address_of(Path("s3:/a.tif")) is None


def test_a_package_that_is_missing_is_named(monkeypatch):
    """A user has not installed what reads addresses."""

    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(SettingsError, match=r"s3://b/a\.zarr: reading it needs s3fs: pip install 'napari-distillfss\["):
        open_volume("s3://b/a.zarr")


@pytest.mark.parametrize("address", ["s3://archive/a.zarr", "http://127.0.0.1:1/a.zarr"])
def test_a_server_that_cannot_be_reached_gives_one_line(address, tmp_path, plain_student):
    """A laptop is offline."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install s3fs")
    plain_student.save(tmp_path / "model.safetensors")
    program = (
        "import sys; from distillfss_core.volumes import remote; remote.PAUSES = (0.01,); "
        "from distillfss_core.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["segment", address, "-m", "model.safetensors", "-o", "out.ome.zarr", "--device", "cpu"]
    offline = {**os.environ, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    ended = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == ERROR
    assert ended.stderr.startswith(f"distillfss: error: {address}")
    assert "check the connection and the address" in ended.stderr
    assert ended.stderr.count("\n") == 1

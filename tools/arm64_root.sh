#!/usr/bin/env bash
# Builds the folder that spa's arm64 engine runs in: Debian's Python for arm64, and onnxruntime for it, under qemu's user-mode emulation.
# Nothing of the system is changed: no binfmt, no foreign architecture in dpkg, no root. Needs Debian's apt-get and dpkg, pip and unzip,
# and to run it qemu-aarch64-static (apt install qemu-user-static). About 130 MB.
#
#     tools/arm64_root.sh [FOLDER] [ONNXRUNTIME_VERSION]        FOLDER: ~/.cache/spa/arm64, where spa looks unless SPA_ARM64_ROOT says else
set -euo pipefail
folder=$(realpath -m "${1:-$HOME/.cache/spa/arm64}")
version=${2:-$(python3 -c 'import onnxruntime; print(onnxruntime.__version__)' 2>/dev/null || true)}
mkdir -p "$folder"/{lists/partial,cache/archives/partial,root/proc,site,wheels}
: > "$folder/status"

apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o "Dir::State::Lists=$folder/lists" -o "Dir::State::status=$folder/status"
     -o "Dir::Cache=$folder/cache" -o Debug::NoLocking=1)
"${apt[@]}" update
"${apt[@]}" install -y --no-install-recommends --download-only libc6 libstdc++6 libgcc-s1 libgomp1 python3.11
for package in "$folder"/cache/archives/*.deb; do dpkg -x "$package" "$folder/root"; done

python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 --implementation cp \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 --platform any \
    -d "$folder/wheels" "onnxruntime${version:+==$version}" numpy flatbuffers protobuf packaging ml-dtypes
for wheel in "$folder"/wheels/*.whl; do unzip -q -o "$wheel" -d "$folder/site"; done

# onnxruntime reads what the processor can from /proc/cpuinfo, and crashes on that of another architecture; qemu looks under its root first.
# The features are those of the Neoverse N1, which spa lets qemu emulate: a feature listed here that is not emulated ends in an illegal
# instruction.
for processor in $(seq 0 $(($(nproc) - 1))); do
    printf 'processor\t: %s\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\n' "$processor"
    printf 'CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n'
done > "$folder/root/proc/cpuinfo"

rm -rf "$folder/cache" "$folder/lists" "$folder/wheels" "$folder/status"
echo "$folder is ready; unless it is ~/.cache/spa/arm64: export SPA_ARM64_ROOT=$folder"

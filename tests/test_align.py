"""Blocks of channels by engine, whatever machine this is."""

from __future__ import annotations

import pytest

from spa.engines import find
from spa.plans import align


@pytest.fixture(autouse=True)
def _forget():
    align._flags.cache_clear()
    yield
    align._flags.cache_clear()


def machine(monkeypatch: pytest.MonkeyPatch, name: str, flags: str) -> None:
    monkeypatch.setattr(align.platform, "machine", lambda: name)
    monkeypatch.setattr(align.Path, "read_text", lambda self, encoding: f"processor : 0\n{flags}\nbugs : avx512f\n")


@pytest.mark.parametrize(
    "name, flags, block",
    [("x86_64", "flags : fpu avx2 avx512f avx512vl", 16), ("AMD64", "flags : fpu avx2", 8), ("aarch64", "flags : avx512f", 8),
     ("x86_64", "flags : avx512fp16", 8), ("x86_64", "flags\t\t: avx512f", 16), ("x86_64", "no such line", 8)],
)
def test_blocks_of_the_processor(monkeypatch: pytest.MonkeyPatch, name: str, flags: str, block: int) -> None:
    machine(monkeypatch, name, flags)
    assert {align.block_of(n) for n in ("cpu", "node", "ncnn", "mnn", "tract", "openvino", "anything")} == {block}


@pytest.mark.parametrize("flags, block", [("avx512f amx_bf16 amx_tile", 32), ("avx512f amx_tile", 16), ("avx2", 8)])
def test_tiles_of_bfloat16(monkeypatch: pytest.MonkeyPatch, flags: str, block: int) -> None:
    machine(monkeypatch, "x86_64", f"flags : {flags}")
    assert align.block_of("openvino") == align.block_of("openvino-native") == block
    assert align.block_of("cpu") == min(block, 16)


def test_no_file_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self, encoding):
        raise FileNotFoundError

    monkeypatch.setattr(align.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(align.Path, "read_text", missing)
    assert align.block_of("cpu") == 8


@pytest.mark.parametrize("name, block", [
    ("cuda", 64), ("tensorrt", 64), ("qnn", 32), ("litert", 32), ("xnnpack", 32), ("arm64", 8), ("webgpu", 8), ("node-wasm", 4)])
def test_engines_with_blocks_of_their_own(name: str, block: int) -> None:
    assert align.block_of(name) == block


def test_this_machine() -> None:
    assert find("cpu").block() == align.block_of("cpu") in (8, 16)

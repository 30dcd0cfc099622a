"""Blocks of channels by provider, whatever machine this is."""

from __future__ import annotations

import pytest

from spa import align


@pytest.fixture(autouse=True)
def _forget():
    align._avx512.cache_clear()
    yield
    align._avx512.cache_clear()


@pytest.mark.parametrize(
    "machine, flags, block",
    [("x86_64", "flags : fpu avx2 avx512f avx512vl", 16), ("AMD64", "flags : fpu avx2", 8), ("aarch64", "avx512f", 8),
     ("x86_64", "flags : avx512fp16", 8)],
)
def test_blocks_of_the_processor(monkeypatch: pytest.MonkeyPatch, machine: str, flags: str, block: int) -> None:
    monkeypatch.setattr(align.platform, "machine", lambda: machine)
    monkeypatch.setattr(align.Path, "read_text", lambda self, encoding: flags + " ")
    assert align.block_of("cpu") == block


def test_no_file_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self, encoding):
        raise FileNotFoundError

    monkeypatch.setattr(align.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(align.Path, "read_text", missing)
    assert align.block_of("cpu") == 8


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "anything"])
def test_other_providers(provider: str) -> None:
    assert align.block_of(provider) == 16


def test_this_machine() -> None:
    assert align.block_of("cpu") in (8, 16)

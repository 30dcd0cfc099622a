"""Shows what a language model with a key-value cache generates, greedily, and that it is the same with the cache as without.

    python -m tools.generate MODEL --prompt "The capital of France is" [--tokens 40] [--tokenizer tokenizer.json] [--compare]

MODEL has the inputs that `models.cached.export_cached` gives, or is one that was pruned from such a model. The tokenizer is by
default the one beside MODEL.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from models.cached import generate
from models.extras import need


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the text and the speed; the exit status is 1 if --compare finds another text without the cache."""
    parser = argparse.ArgumentParser(prog="python -m tools.generate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, default=40, help="most tokens to generate")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; by default the one beside MODEL")
    parser.add_argument("--compare", action="store_true", help="also generate without the cache, which takes longer")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    place = options.tokenizer or options.model.with_name("tokenizer.json")
    for path in (options.model, place):
        if not path.is_file():
            print(f"generate: there is no file {path}", file=sys.stderr)
            return 2
    tokenizer = need("tokenizers", extra="language").Tokenizer.from_file(str(place))
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(str(options.model), settings, providers=["CPUExecutionProvider"])
    ids = np.array(tokenizer.encode(options.prompt).ids, np.int64)
    start = time.perf_counter()
    found = generate(session, ids, options.tokens)
    took = time.perf_counter() - start
    print(options.prompt + tokenizer.decode(found))
    print(f"{len(found)} tokens in {took:.2f} s, {len(found) / took:.1f} a second", file=sys.stderr)
    if options.compare:
        same = found == generate(session, ids, options.tokens, cache=False)
        print("without the cache: the same tokens" if same else "without the cache: other tokens", file=sys.stderr)
        return 0 if same else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

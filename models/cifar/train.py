"""`python -m models.cifar.train NETWORK --epochs 36 -o FOLDER`: trains a reference network and exports it to ONNX.

SGD with Nesterov momentum (AdamW for the transformer), one cycle of the learning rate, crops of 4 pixels and flips; bfloat16 where the
processor has it, CUDA where there is a GPU. Seeded. A checkpoint after each epoch: killed and run again, it goes on.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from models.cifar import data
from models.cifar.networks import NETWORKS
from models.extras import need

torch: Any = need("torch")


def augmented(images: Any, generator: Any) -> Any:
    """(n, 3, 32, 32) shifted by up to 4 pixels and mirrored half of the time, all on the tensor's device."""
    n = len(images)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # (n, 3, 9, 9, 32, 32), a view
    top, left = torch.randint(0, 9, (2, n), generator=generator)
    cut = windows[torch.arange(n), :, top, left]
    flip = torch.rand(n, generator=generator) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1).to(cut.device), cut.flip(3), cut).contiguous()


def accuracy(network: Any, images: Any, labels: Any, batch: int = 500) -> float:
    """Share of the images that the network labels right, in percent."""
    network.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(images), batch):
            right += int((network(images[start : start + batch]).argmax(1) == labels[start : start + batch]).sum())
    return 100 * right / len(images)


def train(name: str, *, epochs: int, folder: Path, batch: int, rate: float, decay: float, smoothing: float, seed: int) -> Path:
    """Trains, logs to FOLDER/NAME.csv, exports to FOLDER/NAME.onnx; returns that path."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = data.train()
    x = torch.from_numpy(data.normalized(np.asarray(images))).to(device)
    y = torch.from_numpy(labels).to(device)
    held, truth = data.test()
    test_x, test_y = torch.from_numpy(data.normalized(np.asarray(held))).to(device), torch.from_numpy(truth).to(device)
    network = NETWORKS[name]().to(device).to(memory_format=torch.channels_last)
    steps = len(x) // batch
    if name == "vit":
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, epochs * steps, pct_start=0.2, anneal_strategy="linear", div_factor=10, final_div_factor=1e4, cycle_momentum=False
    )
    state, log = folder / f"{name}.state", folder / f"{name}.csv"
    first = 0
    if state.is_file():
        kept = torch.load(state, map_location=device, weights_only=True)
        network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        generator.set_state(kept["generator"])
        first = kept["epoch"]
    for epoch in range(first, epochs):
        network.train()
        began, total = time.time(), 0.0
        for index in torch.randperm(len(x), generator=generator)[: steps * batch].view(steps, batch):
            inputs = augmented(x[index], generator).to(memory_format=torch.channels_last)
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(network(inputs).float(), y[index], label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        row = [epoch + 1, f"{total / steps:.4f}", f"{accuracy(network, test_x, test_y):.2f}", f"{time.time() - began:.0f}"]
        fresh = not log.is_file()
        with log.open("a", newline="") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            if fresh:
                writer.writerow(["epoch", "loss", "test accuracy %", "seconds"])
            writer.writerow(row)
        print(name, *row, flush=True)
        kept = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                "generator": generator.get_state(), "epoch": epoch + 1}  # fmt: skip
        torch.save(kept, f"{state}.new")
        os.replace(f"{state}.new", state)
    return export(network.cpu().eval(), folder / f"{name}.onnx")


def export(network: Any, path: Path) -> Path:
    """Writes `image` (batch, 3, 32, 32) -> `logits` (batch, 10), with its BatchNorm nodes kept."""
    image = torch.zeros(2, 3, 32, 32)
    torch.onnx.export(
        network, (image,), str(path), dynamo=False, opset_version=17, input_names=["image"], output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}}, training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
    )  # fmt: skip
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m models.cifar.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, help="highest learning rate; by default 0.2, and 0.001 for the transformer")
    parser.add_argument("--decay", type=float, help="weight decay; by default 5e-4, and 0.05 for the transformer")
    parser.add_argument("--smoothing", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("."), metavar="FOLDER")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    given.output.mkdir(parents=True, exist_ok=True)
    transformer = given.network == "vit"
    train(
        given.network, epochs=given.epochs, folder=given.output, batch=given.batch,
        rate=given.rate or (1e-3 if transformer else 0.2), decay=(0.05 if transformer else 5e-4) if given.decay is None else given.decay,
        smoothing=given.smoothing, seed=given.seed,
    )  # fmt: skip


if __name__ == "__main__":
    main()

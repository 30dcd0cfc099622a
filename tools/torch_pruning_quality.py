"""Torch-Pruning on the CIFAR-10 networks, for the quality benchmark: the same weights, nothing trained after pruning."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from models.cifar.networks import NETWORKS
from models.cifar.train import export
from models.extras import need
from models.tasks import TASKS


def pruned(
    name: str, criterion: str, ratio: float, batches: list[dict[str, Any]], threads: int
) -> tuple[onnxruntime.InferenceSession, float, float]:
    """A session of the network pruned by Torch-Pruning ("l2" or "taylor"), and how many times fewer MACs and parameters it has."""
    torch, pruning = need("torch"), need("torch_pruning")
    network = NETWORKS[name]()
    network.load_state_dict(_weights(TASKS[name].model(), network), strict=False)
    network.eval()
    image = torch.zeros(1, 3, 32, 32)
    importance = pruning.importance.GroupMagnitudeImportance(p=2) if criterion == "l2" else pruning.importance.GroupTaylorImportance()
    heads = [m for m in network.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 10]
    macs, parameters = pruning.utils.count_ops_and_params(network, image)
    pruner = pruning.pruner.BasePruner(network, image, importance=importance, pruning_ratio=ratio, ignored_layers=heads)
    if criterion == "taylor":
        for batch in batches:
            loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(batch["image"])), torch.from_numpy(batch["labels"]))
            (loss / len(batches)).backward()
    pruner.step()
    left, kept = pruning.utils.count_ops_and_params(network, image)
    with tempfile.TemporaryDirectory() as folder:
        path = export(network.eval(), Path(folder) / "pruned.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return opened, macs / left, parameters / kept


def _weights(path: Path, network: Any) -> dict[str, Any]:
    """The trained weights by the names of torch, which the export keeps."""
    torch = need("torch")
    graph = onnx.load(path).graph
    stored = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    for node in graph.node:  # equal tensors are one initializer, and Identity gives them their other names
        if node.op_type == "Identity" and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
    names = set(network.state_dict())
    missing = {n for n in names if "num_batches" not in n} - set(stored)
    if missing:
        raise RuntimeError(f"{path} does not hold the weights {', '.join(sorted(missing)[:3])}")
    return {n: v for n, v in stored.items() if n in names}

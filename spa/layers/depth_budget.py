"""A budget and layers: how many a budget asks for, and what of it is left for channels once they have gone.

Shares are of the model as given, and what the layers have saved counts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from spa.budgets.budget import Budget
from spa.budgets.problems import static_costs
from spa.budgets.steps import spelled
from spa.budgets.targets import Target, read_targets
from spa.errors import BadOption
from spa.graph.analysis import Analysis
from spa.graph.parting import parted
from spa.layers.depth import ANY, Depth
from spa.layers.sublayers import ATTENTION, MLP, sub_layers

ALPHA = 1.5  # of the paper: how much rather neurons go than attention


def budget_left(analysis: Analysis, budget: Budget) -> Budget | None:
    """The budget for channels of a model without some layers, in absolute figures; None if the layers alone have met it.

    Latency stays a share: it is always measured against the model as given.
    """
    targets = read_targets(budget.target)
    whole, left = _costs(analysis.dense), _costs(analysis)
    limits = [t if t.kind == "latency" else Target(t.kind, t.limit(whole[t.kind]), False) for t in targets]
    rest = [t for t in limits if t.kind == "latency" or left[t.kind] > t.value]
    if targets and not rest and budget.max_drop is None:
        return None
    return replace(budget, target=tuple(spelled(t) if not t.relative else f"{t.kind}={t.value:.9g}x" for t in rest))


def balanced(analysis: Analysis, depth: Depth, budget: Budget) -> Depth | None:
    """How many attention sub-layers go where a number of parameters is to go: 2SSP (arXiv 2501.17771), eq. 5.

    N = round(L s^((P_MLP / P_attn) / α)), α = 1.5, with L attention sub-layers of P_attn parameters each on average, P_MLP those of an MLP,
    and s the share of both together that goes. What they leave of the budget is for channels: neurons alike in all layers with
    `--units neuron --allocation uniform`, as in the paper, where neurons go first. None where N is 0.
    Raises BadOption without a limit on parameters, for layers of another kind, and where the model has not enough of both kinds.
    """
    limit = next((t for t in read_targets(budget.target) if t.kind == "params"), None)
    if limit is None:
        raise BadOption("--drop-layers balance shares out the parameters that go (2SSP): say how many stay with --target params=0.75.")
    if depth.kind not in (ANY, ATTENTION):
        raise BadOption(f"--drop-layers balance drops attention sub-layers, not those of the kind {depth.kind!r}: leave out --layer-kind.")
    layers = sub_layers(parted(analysis).groups).layers
    attention, mlp = ([s.parameters for s in layers if s.kind == kind] for kind in (ATTENTION, MLP))
    if not attention or not mlp:
        raise BadOption("--drop-layers balance weighs attention against MLPs, and this model has not both: give a number of layers.")
    total = _costs(analysis)["params"]
    share = (total - limit.limit(total)) / (sum(attention) + sum(mlp))
    if share >= 1:
        raise BadOption(f"--target params: attention and MLPs are {sum(attention) + sum(mlp):,} of {total:,.0f} parameters, fewer than are "
                        "to go: ask for less, or give a number of layers.")  # fmt: skip
    number = round(len(attention) * max(share, 0.0) ** (np.mean(mlp) / np.mean(attention) / ALPHA))
    return replace(depth, drop=number, kind=ATTENTION) if number else None


def _costs(analysis: Analysis) -> dict[str, float]:
    sizes = np.array([[g.size for g in analysis.groups.groups]], np.float64)
    return {k: float(v[0]) for k, v in static_costs(analysis.groups, analysis.nbytes)(sizes).items()}

"""spa: structured pruning of ONNX graphs. A file and a budget in; a smaller, proven, faster file out.

    result = spa.prune("model.onnx", ratio=0.5)
    result.save("small.onnx", plan="small.plan.json")

The stages, each a function: `load`, `normalize`, `trace`, `find_groups`, `score`, `choose`/`make_plan`, `rewrite`, `compare`, `race`.
"""

from spa.api import Analysis, Result, analyze, apply, plan, prune
from spa.budgets.budget import Budget
from spa.budgets.sensitivity import sensitivity
from spa.criteria import criterion
from spa.criteria.score import score
from spa.errors import BadFile, BadModel, BadOption, BadPlan, CheckFailed, NothingToPrune, SpaError, UnsupportedModel
from spa.exact import Ranks
from spa.exact.rewriting import Rewritten, rewritten
from spa.exact.rotation import Rotated, rotated
from spa.frameworks.keras_model import apply_to_keras
from spa.frameworks.torch_module import apply_to_torch
from spa.frameworks.trees import apply_to_arrays
from spa.graph.count import Counts, count
from spa.graph.groups import Group, Groups, find_groups
from spa.graph.normalize import normalize
from spa.graph.trace import trace
from spa.intake import Converted, convert
from spa.layers.depth import Depth
from spa.learning.finetune import finetune
from spa.learning.training import Training
from spa.plans.choose import Options, choose
from spa.plans.plan import Plan, load_plan, make_plan
from spa.plans.rewrite import rewrite
from spa.proof.check import Check, compare
from spa.proof.masking import masked
from spa.repairs.repair import Repaired, RepairOptions
from spa.reporting import write_report
from spa.signatures import FIXED, MAP, STAT, SUM, signature
from spa.storage.store import Model, load, save
from spa.sweeps.sweep import sweep
from spa.tables.sweep_report import write_sweep
from spa.timing.bench import race
from spa.vocabularies.vocabulary_prune import prune_vocabulary

__version__ = "0.1.0"

__all__ = [
    "FIXED",
    "MAP",
    "STAT",
    "SUM",
    "Analysis",
    "BadFile",
    "BadModel",
    "BadOption",
    "BadPlan",
    "Budget",
    "Check",
    "CheckFailed",
    "Converted",
    "Counts",
    "Depth",
    "Group",
    "Groups",
    "Model",
    "NothingToPrune",
    "Options",
    "Plan",
    "Ranks",
    "RepairOptions",
    "Repaired",
    "Result",
    "Rewritten",
    "Rotated",
    "SpaError",
    "Training",
    "UnsupportedModel",
    "analyze",
    "apply",
    "apply_to_arrays",
    "apply_to_keras",
    "apply_to_torch",
    "choose",
    "compare",
    "convert",
    "count",
    "criterion",
    "find_groups",
    "finetune",
    "load",
    "load_plan",
    "make_plan",
    "masked",
    "normalize",
    "plan",
    "prune",
    "prune_vocabulary",
    "race",
    "rewrite",
    "rewritten",
    "rotated",
    "save",
    "score",
    "sensitivity",
    "signature",
    "sweep",
    "trace",
    "write_report",
    "write_sweep",
]

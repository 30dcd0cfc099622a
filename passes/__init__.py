"""Graph-surgeon passes: each one function on a graphsurgeon Graph, told by plain data what to do.

Two kinds, kept apart. Those that keep the function: `fold_constants`, `gather_shuffles`, `unshare_constants`, `merge_copies`,
`drop_dead_nodes`, `drop_false_shapes`, `split_branches`, and `replace_constants`, `drop_biases` and `turn_stream` as far as what they are
told does. Those that change it as told: `remove_channels`, `drop_branches`, `zero_branches`, `insert_gates`, `insert_masks`,
`scale_inputs`, `mix_outputs`; `insert_biases` adds zeros, for repair to fill, `insert_id_maps` lets a pruned vocabulary be fed as before.
Each returns how many changes it made and is idempotent, unless it says otherwise.
This package imports nothing of ours.
"""

from passes.biases import insert_biases
from passes.branches import drop_branches
from passes.cast import Widened
from passes.constants import drop_dead_nodes, fold_constants, merge_copies, unshare_constants
from passes.declared import drop_false_shapes
from passes.exact import drop_biases, replace_constants
from passes.gates import Gate, Scale, insert_gates, scale_inputs, zero_branches
from passes.ids import insert_id_maps
from passes.mask import Compress, Mask, insert_masks
from passes.mixing import mix_outputs
from passes.parting import part_sums
from passes.remove import DELETE, Patch, Removal, remove_channels
from passes.shuffles import gather_shuffles
from passes.split import Branch, split_branches
from passes.turn import Turn, turn_stream
from passes.weights import Weight

__all__ = [
    "DELETE",
    "Branch",
    "Compress",
    "Gate",
    "Mask",
    "Patch",
    "Removal",
    "Scale",
    "Turn",
    "Weight",
    "Widened",
    "drop_biases",
    "drop_branches",
    "drop_dead_nodes",
    "drop_false_shapes",
    "fold_constants",
    "gather_shuffles",
    "insert_biases",
    "insert_gates",
    "insert_id_maps",
    "insert_masks",
    "merge_copies",
    "mix_outputs",
    "part_sums",
    "remove_channels",
    "replace_constants",
    "scale_inputs",
    "split_branches",
    "turn_stream",
    "unshare_constants",
    "zero_branches",
]

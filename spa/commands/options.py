"""The options that commands take, as typer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spa.commands.reading import limited

ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file.", show_default=False)]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan made by `spa plan` or `spa prune`.", show_default=False)]
Out = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Where to write the pruned model.", show_default=False)]
PlanOut = Annotated[Path, typer.Option("--output", "-o", metavar="PLAN", help="Where to write the plan.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with exact numbers.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every stage to stderr, and tracebacks of defects.")]
Ratio = Annotated[float | None, typer.Option(
    "--ratio", "-r", help="Share of the channels that goes, between 0 and 1; 0.5 if there is no target.", show_default=False)]
Target = Annotated[list[str] | None, typer.Option(
    "--target", metavar="COST=LIMIT", help="macs=0.5, params=2M, size=8MB, memory=64MB, latency=20ms or latency=0.6x; repeatable.",
    show_default=False)]
Allocation = Annotated[str, typer.Option(
    "--allocation", metavar="WAY",
    help="How a target is spread over groups: auto, uniform, global, sensitivity, solver; adaptive spreads --max-drop.")]
MaxDrop = Annotated[float | None, typer.Option(
    "--max-drop", metavar="N", help="Most that may be lost by --metric, in its unit.", show_default=False)]
Metric = Annotated[str | None, typer.Option(
    "--metric", metavar="NAME", help="accuracy, top5, agreement, cosine, kl, error, perplexity or module:function.", show_default=False)]
Evaluate = Annotated[str | None, typer.Option(
    "--evaluate", metavar="SOURCE", help="Data to judge on, as --calibration takes them; by default a quarter of those is held out.",
    show_default=False)]
OutputName = Annotated[str | None, typer.Option(
    "--output-name", metavar="NAME", help="Output that the metric looks at; by default the first.", show_default=False)]
Provider = Annotated[str, typer.Option("--provider", metavar="NAME", help="Execution provider to round for and to time on.")]
TimeLimit = Annotated[float, typer.Option("--time-limit", min=0, metavar="SECONDS", help="For measuring losses; 0: go by scores.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Steps of the way, channels scored anew after each.")]
QkRank = Annotated[float | None, typer.Option(
    "--qk-rank", metavar="R", help="Directions that queries and keys of each head keep, in their singular basis: a number or a share.",
    show_default=False)]
VoRank = Annotated[float | None, typer.Option(
    "--vo-rank", metavar="R", help="The same for values and outputs.", show_default=False)]
Scope = Annotated[str | None, typer.Option(
    "--scope", metavar="SCOPE",
    help="Of a ratio. local (default): same share each; global: one threshold; isomorphic: per shape; cost: global, by parameters; "
    "log: more of late layers.",
    show_default=False)]
Criterion = Annotated[str, typer.Option("--criterion", metavar="NAME", help="What makes a channel worth keeping: l2, obspa, taylor, …")]
Aggregate = Annotated[str | None, typer.Option(
    "--aggregate", metavar="WAY", help="How scores of a group's layers are joined: sum, mean, median, max, prod.", show_default=False)]
Normalize = Annotated[str, typer.Option(
    "--normalize", metavar="WAY", help="How groups compare: none, sum, mean, max, standardize, energy.")]
Scores = Annotated[Path | None, typer.Option(
    "--scores", metavar="FILE", help="Scores, masks and scales of channels, .npz: by name of the group, or VALUE:AXIS.",
    show_default=False)]
Swaps = Annotated[int, typer.Option("--swaps", min=0, help="Rounds of exchanging removed for kept channels.")]
Loss = Annotated[str, typer.Option("--loss", metavar="NAME", help="For gradients: auto, cross-entropy, entropy or module:function.")]
Source = Annotated[str | None, typer.Option(
    "--calibration", metavar="SOURCE", help="Data: .npz, pictures, text, a folder, module:function; or none (noise), synthetic, moments.",
    show_default=False)]
Preprocess = Annotated[str | None, typer.Option(
    "--preprocess", metavar="HOW", help="For pictures: imagenet, cifar10, lite0, …, a file, or size=224,mean=0.5.",
    show_default=False)]
Tokenizer = Annotated[str | None, typer.Option(
    "--tokenizer", metavar="PATH", help="For text: a tokenizer.json or a Hugging Face folder.", show_default=False)]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Most calibration samples.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Most samples in a batch, where the model leaves that free; fewer if large.")]
Length = Annotated[int | None, typer.Option("--length", min=1, help="Tokens in a row of text.", show_default=False)]
Labels = Annotated[str | None, typer.Option(
    "--labels", metavar="NAME", help="Entry of the data that holds labels, for losses.", show_default=False)]
Repair = Annotated[str | None, typer.Option(
    "--repair", metavar="METHOD", help="none, bias, affine, obspa or fold; obspa where --calibration is given.", show_default=False)]
Damping = Annotated[float, typer.Option("--damping", help="Ridge of repair and of errors, over the mean variance of a layer's inputs.")]
RepairInputs = Annotated[str, typer.Option(
    "--repair-inputs", metavar="WHICH", help="pruned: as layers before left them; dense: each layer alone.")]
RepairTarget = Annotated[str, typer.Option("--repair-target", metavar="WHICH", help="What layers are fitted to: dense or pruned.")]
NoNorms = Annotated[bool, typer.Option("--no-norms", help="Leave the statistics that BatchNorm stores as they were.")]
RepairedOut = Annotated[Path | None, typer.Option(
    "--repaired-out", metavar="FILE", help="Also write the repaired model before the deletion, and its plan.", show_default=False)]
Report = Annotated[Path | None, typer.Option(
    "--report", metavar="FILE", help="Also write a report for people: .html (one page), .md or .json.", show_default=False)]
MultipleOf = Annotated[str, typer.Option("--multiple-of", metavar="N|auto", help="Round widths; auto: what the CPU provider likes.")]
KeepAtLeast = Annotated[int, typer.Option("--keep-at-least", help="Channels that every group keeps.")]
Include = Annotated[list[str] | None, typer.Option(
    "--include", metavar="PATTERN", help="Only groups, nodes and values of this glob or /regex/, or kind:head.")]
Exclude = Annotated[list[str] | None, typer.Option(
    "--exclude", metavar="PATTERN", help="Not these; may be given more than once, like --include.")]
Units = Annotated[str | None, typer.Option(
    "--units", metavar="KIND,…", help="Only groups of these kinds: head, neuron, channel, …, as `spa inspect` shows them.",
    show_default=False)]
ProtectFile = Annotated[Path | None, typer.Option(
    "--protect", metavar="FILE", help="What stays: lines of a pattern, or of a pattern: coordinates (heads.*: 3,7-9).",
    show_default=False)]
Ratios = Annotated[Path | None, typer.Option("--ratios", metavar="FILE", help="YAML or TOML: pattern -> ratio of its own.")]
Protect = Annotated[bool, typer.Option("--protect-outputs/--no-protect-outputs", help="Leave the outputs' axes whole.")]
NoStat = Annotated[bool, typer.Option("--no-stat", help="Leave axes that a normalisation runs over.")]
Companions = Annotated[str | None, typer.Option(
    "--companions", metavar="FOLDER|none", help="Where config.json, genai_config.json and the tokenizer are; they are written anew beside "
    "OUT. By default MODEL's folder, if OUT goes to another.", show_default=False)]
KeepState = Annotated[bool, typer.Option(
    "--keep-state", help="Leave inputs and outputs that carry a key-value cache from call to call whole; else they shrink together.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="For random scores and drawn inputs.")]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Skip the proof that removing equals masking.")]
Tolerance = Annotated[float, typer.Option("--tolerance", help="What the proof allows, relative to an output's scale.")]
Inputs = Annotated[list[str] | None, typer.Option("--input", metavar="NAME:1x3x224x224", help="Shape of an input; repeatable.")]
FeedsFile = Annotated[Path | None, typer.Option("--feeds", metavar="FILE.npz", help="Inputs for the proof and the timing, by name.")]
NoBench = Annotated[bool, typer.Option("--no-bench", help="Do not measure latency.")]
Memory = Annotated[str | None, typer.Option(
    "--memory", metavar="SIZE", callback=limited, show_default=False,
    help="Most that statistics, data and running models fill, such as 4GB; what does not fit waits in files or runs in pieces.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="Threads of the timing; 0: ONNX Runtime's choice.")]
OtherWeights = Annotated[bool, typer.Option("--other-weights", help="Accept a model of the same graph with other weights.")]
Vocab = Annotated[str | None, typer.Option(
    "--vocab", metavar="KEEP", help="Ids to keep: a share, a number, used (all in --calibration), or a file of ids; others go.",
    show_default=False)]
VocabSide = Annotated[str, typer.Option("--vocab-side", metavar="SIDE", help="Where ids go from: both, input (tables), output (logits).")]
VocabMap = Annotated[str, typer.Option(
    "--vocab-map", metavar="PLACE", help="file: the pruned model takes new ids; graph: it takes old ones.")]
VocabInput = Annotated[list[str] | None, typer.Option(
    "--vocab-input", metavar="NAME", help="Input that holds ids; by default the one with the longest table.", show_default=False)]
Rotate = Annotated[bool, typer.Option(
    "--rotate", help="Turn the residual stream onto the principal directions of --calibration, and cut its last positions (SliceGPT).")]
DropLayers = Annotated[str | None, typer.Option(
    "--drop-layers", metavar="N|SHARE|NAMES|balance", help="Layers that go first: how many, a share (0.2), names with commas, or balance: "
    "as many attention sub-layers as --target params is best met with (2SSP).",
    show_default=False)]
LayerKind = Annotated[str, typer.Option("--layer-kind", metavar="KIND", help="Which layers: any, attention, mlp, branch or block.")]
LayerMethod = Annotated[str, typer.Option(
    "--layers", metavar="METHOD", help="How layers are chosen: finercut, llm-drop, shortgpt, replaceme, 2ssp, tracenas, random.")]

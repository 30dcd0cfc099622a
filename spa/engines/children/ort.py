"""ONNX Runtime with one execution provider and nothing but that provider: `serve.py ort.py PROVIDER`, or imported by spa itself.

Where a session runs is never taken on trust. It is made with the CPU's fallback disabled (`session.disable_cpu_ep_fallback`) and without
the Python wrapper's, which re-runs everything on the CPU after an error and so compares the CPU with itself. Only if the provider cannot
take some nodes is a second session made that lets the CPU have them, and its recorded assignment says which those are; the provider's
own log says why.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

CPU, OPENVINO = "CPUExecutionProvider", "OpenVINOExecutionProvider"
PLUGINS = {OPENVINO: "onnxruntime_ep_openvino", "QNNExecutionProvider": "onnxruntime_qnn"}  # provider -> package
GIVEN_UP = "fallback to CPU EP has been explicitly disabled"  # what onnxruntime says where a node is left to the CPU
SILENT, VERBOSE = 4, 0  # severities of onnxruntime's log
ERROR = re.compile(r"\[E:[^\]]*\] (?P<text>[^\n\x1b]*)")
PLACED = re.compile(r"(?:Node\(s\)|All nodes) placed on \[(?P<provider>\w+)\]. Number of nodes: (?P<count>\d+)")
REASONS = (  # what providers write into the log about a node that they leave
    (re.compile(r"Node name: (?P<node>.*?) Node index: \d+\s+REASON ?: ?(?P<why>.*)"), "{why}"),  # QNN
    (re.compile(r"kernel not found in registries for Op type: (?P<why>\S+) node name: (?P<node>.*)"), "it has no kernel for this {why}"),
    (re.compile(r"Force fallback to CPU execution for node: (?P<node>.*?) because (?P<why>.*)"), "{why}"),
)


def devices(provider: str) -> Any:
    """None where onnxruntime was built with the provider; the devices that its plugin offers otherwise. Raises ImportError."""
    import onnxruntime as ort

    if provider in ort.get_available_providers():
        return None
    package = PLUGINS.get(provider)
    if package is None:
        raise ImportError(f"this onnxruntime {ort.__version__} has no {provider}, only {', '.join(ort.get_available_providers())}")
    found = [d for d in ort.get_ep_devices() if d.ep_name == provider]
    if not found:
        ort.register_execution_provider_library(provider, importlib.import_module(package).get_library_path())
        found = [d for d in ort.get_ep_devices() if d.ep_name == provider]
    if not found:
        makers = sorted({d.device.vendor for d in ort.get_ep_devices()})
        raise ImportError(f"{_package_version(package)} offers no device on this machine, whose processor is by {', '.join(makers)}")
    return found


def version_of(provider: str) -> str:
    """Of onnxruntime and of the provider's plugin. Raises ImportError where it cannot be used."""
    import onnxruntime as ort

    plugin = devices(provider) is not None
    return f"onnxruntime {ort.__version__}" + (f", {_package_version(PLUGINS[provider])}" if plugin else "")


def _package_version(package: str) -> str:
    for name in (package.replace("_", "-"), package):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return package


class Session:
    """An open session.

    Parameters
    ----------
    source
        Path or bytes of a model.
    provider
        As onnxruntime spells it.
    threads
        0 for onnxruntime's choice.
    options
        The provider's own, and spa's: `format` ("ort": the model is converted first), `precision` (OpenVINO's), `profile` (a prefix).
    """

    def __init__(self, source: Any, provider: str, threads: int = 0, options: dict[str, str] | None = None) -> None:
        given = dict(options or {})
        self.provider, self.threads = provider, threads
        self.profile, self.figures = given.pop("profile", ""), {}
        with tempfile.TemporaryDirectory() as folder:
            if given.pop("format", "") == "ort":
                source = to_ort(source, os.path.join(folder, "model.ort"))
                self.figures["ort_bytes"] = os.path.getsize(source)
            self.devices = devices(provider)
            self.options = given
            if provider == OPENVINO:
                self.devices = _named(self.devices, given.get("device_type", "CPU"))
                self.options = _openvino(given, threads, self.devices is not None)
            self._open(source, folder)
            context = [os.path.join(folder, f) for f in os.listdir(folder) if f.endswith(".bin")]
            if context:
                self.figures["context_bytes"] = sum(map(os.path.getsize, context))
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.inputs = {i.name for i in self.session.get_inputs()}
        self.meta = {"nodes": self.nodes, "fell_back": self.fell_back, "proven": self.proven, "figures": self.figures, "closes": True}

    def _open(self, source: Any, folder: str) -> None:
        try:
            self.session, log = self._session(source, os.path.join(folder, "strict"), strict=True)
        except Exception as error:  # onnxruntime raises classes of its own for each status
            if GIVEN_UP not in str(error):
                raise
            self.session, log = self._session(source, os.path.join(folder, "shared"), strict=False)
        self.nodes, self.fell_back, self.proven = placement_of(self.session, self.provider, log)
        if self.fell_back and not self.nodes.get(self.provider):
            why = next(iter(self.fell_back.values()))
            raise RuntimeError(f"{self.provider} took none of the model's {len(self.fell_back)} nodes; the first: {why}")

    def _session(self, source: Any, scratch: str, *, strict: bool) -> tuple[Any, str]:
        """A session and what was logged while it was made."""
        import onnxruntime as ort

        settings = ort.SessionOptions()
        settings.intra_op_num_threads = self.threads
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if self.provider == "QNNExecutionProvider":
            for key, value in (("enable", "1"), ("embed_mode", "0"), ("file_path", f"{scratch}.onnx")):
                settings.add_session_config_entry(f"ep.context_{key}", value)
        if strict and self.provider != CPU:
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if self.profile:
            settings.enable_profiling, settings.profile_file_prefix = True, self.profile
        listed = [(self.provider, self.options)] if self.devices is None else None
        if listed is None:
            settings.add_provider_for_devices(self.devices[:1], self.options)
        settings.log_severity_level = SILENT if self.provider == CPU else VERBOSE
        with captured() if self.provider != CPU else contextlib.nullcontext(str) as read:
            opened = ort.InferenceSession(source, settings, providers=listed, enable_fallback=0)
            log = read()
        opened.disable_fallback()
        if self.provider not in opened.get_providers():  # its library is broken, of which the wrapper only warns
            raise RuntimeError(f"{self.provider} did not start: {last_error_in(log)}")
        return opened, log

    def run(self, feeds: Any) -> dict[str, Any]:
        """All outputs by name."""
        return dict(zip(self.outputs, self.session.run(self.outputs, self._wanted(feeds)), strict=True))

    def bind(self, feeds: Any, device: str = "") -> Callable[[], None]:
        """A call that runs once; with a device, inputs and outputs lie there."""
        wanted = self._wanted(feeds)
        if not device:
            return lambda: self.session.run(self.outputs, wanted)
        import onnxruntime as ort

        binding = self.session.io_binding()
        for name, array in wanted.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))
        for name in self.outputs:
            binding.bind_output(name, device)

        def call() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return call

    def close(self) -> None:
        """Writes the profile, if one was asked for."""
        if self.profile:
            self.session.end_profiling()
            self.profile = ""

    def _wanted(self, feeds: Any) -> dict[str, Any]:
        return {n: v for n, v in feeds.items() if n in self.inputs}


def _named(found: Any, device: str) -> Any:
    """Those of a plugin's devices that OpenVINO knows by a name: CPU, GPU, NPU."""
    names = [d.ep_metadata.get("ov_device", "CPU") for d in found or ()]
    if found is not None and device not in names:
        raise ValueError(f"OpenVINO has no device {device} here, only {', '.join(names)}")
    return None if found is None else [d for d, name in zip(found, names, strict=True) if name == device]


def _openvino(given: dict[str, str], threads: int, plugin: bool) -> dict[str, str]:
    """OpenVINO's options; without the hint it computes in bfloat16 where the processor can."""
    device = given.pop("device_type", "CPU")
    hints = {"INFERENCE_PRECISION_HINT": given.pop("precision", "f32"), **({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})}
    return {**({} if plugin else {"device_type": device}), "load_config": json.dumps({device: hints}), **given}


def placement_of(session: Any, provider: str, log: str) -> tuple[dict[str, int], dict[str, str], bool]:
    """What took how many nodes, the nodes that others took with the reason, and whether the runtime says so at all.

    The recorded assignment holds the nodes that a provider compiled into one, the log those that it took one by one after onnxruntime had
    changed their layout (which the record leaves out): the larger number is the number of nodes.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):  # before 1.24
        return {}, {}, False
    nodes = {m["provider"]: int(m["count"]) for m in PLACED.finditer(log)}
    recorded: dict[str, int] = {}
    left: dict[str, str] = {}
    said = reasons_in(log)
    for part in session.get_provider_graph_assignment_info():
        taken = part.get_nodes()
        recorded[part.ep_name] = recorded.get(part.ep_name, 0) + len(taken)
        for node in taken if part.ep_name != provider else ():
            name = node.name or node.op_type
            unique = name if name not in left else f"{name} #{len(left)}"
            left[unique] = said.get(node.name) or f"{provider} left this {node.op_type} to {part.ep_name} and gave no reason"
    if not recorded:  # as with models in ORT format
        others = {name: count for name, count in nodes.items() if name != provider}
        left = {f"{count} nodes": f"{provider} left them to {name}, without their names" for name, count in others.items()}
    return {n: max(nodes.get(n, 0), recorded.get(n, 0)) for n in {**recorded, **nodes}}, left, bool(recorded or nodes) or provider == CPU


def last_error_in(log: str) -> str:
    """The last error that was logged."""
    found = [re.sub(r".*\[ONNXRuntimeError\] : \d+ : \w+ : ", "", m["text"]).strip() for m in ERROR.finditer(log)]
    return found[-1] if found else "it gave no reason"


def reasons_in(log: str) -> dict[str, str]:
    """Node -> why a provider did not take it, as far as its log says."""
    return {m["node"].strip(): form.format(why=m["why"].strip().rstrip(".")) for found, form in REASONS for m in found.finditer(log)}


@contextlib.contextmanager
def captured() -> Iterator[Callable[[], str]]:
    """What C++ code writes to stderr meanwhile, to be read."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)

        def read() -> str:
            file.seek(0)
            return file.read().decode("utf-8", "replace")

        try:
            yield read
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def to_ort(source: Any, path: str) -> str:
    """Converts a model to ORT format, optimised as onnxruntime's own converter does it by default; the path."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = SILENT
    settings.optimized_model_filepath = path
    settings.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(source, settings, providers=[CPU], disabled_optimizers=["NchwcTransformer"])  # its blocks suit one processor only
    return path


def version() -> str:
    """For serve.py."""
    return version_of(sys.argv[2])


def load(path: str, threads: int, options: dict[str, str]) -> Session:
    """For serve.py."""
    return Session(path, sys.argv[2], threads, options)

"""The one door to the optional packages (PyTorch and friends): a sentence instead of a bare ImportError."""

import importlib
import sys
from typing import Any

_CUSTOM_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    "ps_roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
    *(
        f"_{name}_backward(Tensor gradient) -> Tensor"
        for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
    ),
)
_libraries: list[Any] = []  # what torch.library declares lives as long as its Library object


class MissingExtra(ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def need(module: str, *, extra: str = "models") -> Any:
    """Import an optional module.

    Parameters
    ----------
    module
        Dotted module name.
    extra
        The extra of ``spa-prune`` that installs it.

    Raises
    ------
    MissingExtra
        The module cannot be imported.
    """
    if module.split(".")[0] in ("torchvision", "timm", "transformers"):
        _import_torchvision(extra)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{module} could not be imported ({error}); install it with: pip install 'spa-prune[{extra}]'"
        ) from error


def _import_torchvision(extra: str) -> None:
    """Import torchvision, also where its compiled operators do not fit the installed torch.

    No classifier calls those operators, yet torchvision refuses to import without their declarations.
    """
    if "torchvision" in sys.modules:
        return
    torch = need("torch", extra=extra)
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # who needs it will say so
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _libraries:
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in _CUSTOM_OPERATORS:
            library.define(operator)
        _libraries.append(library)
        importlib.import_module("torchvision")

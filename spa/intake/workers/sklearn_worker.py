"""scikit-learn's estimators and pipelines, by skl2onnx: .skops files, pickles that are trusted, and live objects.

Columns come as one matrix, or where a pipeline picks them by name as one input a column.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

OPSET = 18
NUMBERS = "float32"
HARMLESS = {f"sklearn.neural_network._stochastic_optimizers.{name}" for name in ("AdamOptimizer", "SGDOptimizer")}
"""What a fitted MLP holds of its training, and skops lists as unknown: classes of numbers alone."""


def inputs(source: Any, wish: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, dtype and shape of each input."""
    return _inputs(_opened(source, bool(wish["trust"])), wish)


def convert(source: Any, target: str, wish: Mapping[str, Any]) -> list[str]:
    """Writes the ONNX file: labels and probabilities of a classifier, values of a regressor, columns of a transformer."""
    from skl2onnx import convert_sklearn
    from skl2onnx.common import data_types as kinds
    from skl2onnx.common.exceptions import MissingConverter, MissingShapeCalculator

    model = _opened(source, bool(wish["trust"]))
    _mend_regressors()
    types = {"float32": kinds.FloatTensorType, "float64": kinds.DoubleTensorType, "int64": kinds.Int64TensorType,
             "int32": kinds.Int32TensorType, "string": kinds.StringTensorType, "bool": kinds.BooleanTensorType}  # fmt: skip
    asked = _inputs(model, wish)
    unknown = sorted({t["dtype"] for t in asked} - set(types))
    if unknown:
        raise ValueError(f"skl2onnx takes no inputs of {unknown[0]}: give one of {', '.join(types)}")
    options = {id(model): {"zipmap": False}} if hasattr(model, "predict_proba") else None
    try:
        proto = convert_sklearn(model, initial_types=[(t["name"], types[t["dtype"]](t["shape"])) for t in asked], options=options,
                                target_opset=wish.get("opset") or OPSET)  # fmt: skip
    except (MissingConverter, MissingShapeCalculator) as error:
        raise NotImplementedError(str(error).strip().splitlines()[0]) from error
    except (ValueError, TypeError, RuntimeError) as error:
        kinds_given = ", ".join(f"{t['name']} of {t['dtype']}" for t in asked)
        raise ValueError(f"skl2onnx does not convert it with {kinds_given} ({' '.join(str(error).split())[:100]}); if a column holds text, "
                         f"say so, such as --input {asked[-1]['name']}:1x1:string") from error  # fmt: skip
    with open(target, "wb") as file:
        file.write(proto.SerializeToString())
    return []


def _mend_regressors() -> None:
    """skl2onnx 1.20 lays the values of an MLPRegressor with several outputs in one column; here they keep theirs."""
    from skl2onnx import update_registered_converter
    from skl2onnx.common import _registration as registered
    from sklearn.neural_network import MLPRegressor

    alias = "SklearnMLPRegressor"
    own, sizes = registered.get_converter(alias), registered.get_shape_calculator(alias)
    if getattr(own, "mended", False):
        return

    def convert_regressor(scope: Any, operator: Any, container: Any) -> None:
        own(scope, operator, container)
        columns = operator.raw_operator.n_outputs_
        if columns > 1:
            last = container.nodes[-1]  # to a single column
            last.input[1] = scope.get_unique_variable_name("columns")
            container.add_initializer(last.input[1], 7, [2], [-1, columns])  # 7: int64

    def size_regressor(operator: Any) -> None:
        sizes(operator)
        rows = operator.outputs[0].type.shape[0]
        operator.outputs[0].type.shape = [rows, operator.raw_operator.n_outputs_]

    convert_regressor.mended = True  # type: ignore[attr-defined]
    update_registered_converter(MLPRegressor, alias, size_regressor, convert_regressor, overwrite=True)


def outputs(source: Any, feeds: Mapping[str, Any], wish: Mapping[str, Any]) -> list[Any]:
    """What the estimator gives, in the order of ONNX's outputs."""
    model = _opened(source, bool(wish["trust"]))
    data: Any = next(iter(feeds.values())) if len(feeds) == 1 else _table(feeds)
    if hasattr(model, "predict_proba"):
        return [np.asarray(model.predict(data)), np.asarray(model.predict_proba(data), np.float32)]
    if hasattr(model, "predict"):
        found = np.asarray(model.predict(data), np.float32)
        return [found.reshape(len(found), -1)]
    return [np.asarray(model.transform(data), np.float32)]


def _table(feeds: Mapping[str, Any]) -> Any:
    import pandas

    return pandas.DataFrame({name: column.reshape(-1) for name, column in feeds.items()})


def _inputs(model: Any, wish: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked, types = wish["inputs"], wish.get("dtypes") or {}
    rows = None if wish["dynamic"] != "none" else 1
    names = getattr(model, "feature_names_in_", None)
    if names is not None and _by_name(model):
        foreign = [n for n in asked if n not in names and not n.isdigit()]
        if foreign:
            raise ValueError(f"it has no column {foreign[0]}; it has: {', '.join(map(str, names))}")
        return [{"name": str(n), "dtype": types.get(str(n), NUMBERS), "shape": [rows, 1]} for n in names]
    count = getattr(model, "n_features_in_", None)
    if count is None and not asked:
        raise ValueError("it does not say how many columns it reads (was it fitted?): give --input x:1x12")
    if len(asked) > 1:
        raise ValueError(f"it reads one matrix, but --input names {', '.join(asked)}")
    name, shape = next(iter(asked.items()), ("x", [rows, count]))
    name, shape = "x" if name.isdigit() else name, shape or [rows, count]
    if count is not None and shape[1:] != [count]:
        raise ValueError(f"it reads {count} columns, but --input {name} is {'x'.join(map(str, shape))}: give {name}:1x{count}")
    return [{"name": name, "dtype": types.get(name) or types.get("0") or NUMBERS, "shape": [rows, *shape[1:]]}]


def _by_name(model: Any) -> bool:
    """Whether some step picks columns by their names."""
    steps = [step for _, step in getattr(model, "steps", [])]
    picks = [columns for _, _, columns in getattr(model, "transformers", [])]
    return any(isinstance(c, str) or (isinstance(c, list) and c and isinstance(c[0], str)) for c in picks) or any(map(_by_name, steps))


def _opened(source: Any, trust: bool) -> Any:
    return _read(source, trust) if isinstance(source, str) else source


@functools.lru_cache(maxsize=1)
def _read(source: str, trust: bool) -> Any:
    import sklearn.base

    if source.endswith(".skops"):
        model = _from_skops(source, trust)
    else:
        if not trust:
            raise ValueError("it is a pickle, and loading a pickle runs whatever code lies in it; say --trust if you trust it")
        import joblib

        try:
            model = joblib.load(source)
        except (ImportError, AttributeError):
            raise
        except Exception as error:  # what pickles raise is anything
            raise OSError(f"it is no pickle of scikit-learn ({type(error).__name__}: {error})") from error
    if not isinstance(model, sklearn.base.BaseEstimator):
        raise ValueError(f"it holds a {type(model).__name__}, which is no estimator of scikit-learn")
    return model


def _from_skops(source: str, trust: bool) -> Any:
    import zipfile

    import skops.io

    try:
        unknown = skops.io.get_untrusted_types(file=source)
        doubtful = sorted(set(unknown) - HARMLESS)
        if doubtful and not trust:
            raise ValueError(f"it holds types that skops does not know to be harmless ({', '.join(doubtful)}); say --trust if you trust it")
        return skops.io.load(source, trusted=unknown)
    except (zipfile.BadZipFile, KeyError) as error:
        raise OSError(f"it is no file of skops ({error})") from error

"""What can go wrong, as the person at the keyboard sees it: one sentence that names the cause and the way out."""

from __future__ import annotations


class SpaError(Exception):
    """Anything that spa refuses to do; its text is one clear sentence, and the command line exits with `exit_code`."""

    exit_code = 2


class BadModel(SpaError):
    """The model breaks ONNX's own rules, so that no tool could run it."""


class UnsupportedModel(SpaError):
    """The model may be right, but uses something that spa cannot carry over unharmed."""


class BadFile(SpaError):
    """A file cannot be read or written, or is no ONNX file at all."""


class BadOption(SpaError):
    """An option asks for something impossible or dangerous."""


class BadPlan(SpaError):
    """A plan file cannot be read or does not belong to the model."""


class NothingToPrune(SpaError):
    """The run was right and removed nothing."""

    exit_code = 1


class CheckFailed(SpaError):
    """The pruned model does not give what the masked original gives; nothing was written."""

    exit_code = 1

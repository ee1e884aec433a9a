"""mechlens: what a chat model represents, where, and how sure we can be.

Everything a notebook needs is here by name, as listed in `__init__.pyi`; `import mechlens` itself is instant, and torch
is imported with the first name that needs it. Figures are drawn by `mechlens.runs.report.figures`, notebook views
made by `mechlens.views`.
"""

import ast
import logging
import warnings
from importlib import import_module
from pathlib import Path

# A notebook without ipywidgets shows bars of characters; tqdm says so the first time that a library imports it.
warnings.filterwarnings("ignore", message="IProgress not found")
# transformers and peft import these where they are installed (extra [quantise]), and they tell everybody of GPU kernels
# that aren't there, and of each other.
for _logger, _line in {
    "torchao": "Failed to load ",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",
}.items():
    logging.getLogger(_logger).addFilter(lambda record, line=_line: not str(record.msg).startswith(line))


def _homes() -> dict[str, str]:
    """Every public name and the module that it comes from."""
    listed = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    return {item.names[0].name: str(item.module) for item in listed if isinstance(item, ast.ImportFrom)}


_HOME = _homes()
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        import difflib

        near = difflib.get_close_matches(name, _HOME, 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'mechlens' has no attribute {name!r}{meant}")
    found = getattr(import_module(_HOME[name]), name)
    if isinstance(found, type) and (_HOME[name].endswith(".config") or _HOME[name] == "mechlens.settings"):
        from mechlens.studies.explained import explained

        found = explained(found)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *_HOME})

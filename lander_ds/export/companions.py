"""The small files of a model directory that an export takes over as they are: tokenizer, processors, chat templates,
generation, licence, and the Python code that some of them need.
"""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

from lander_ds.common.files import is_inside

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
"""Patterns of file names."""

_WITH_CODE = (
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Their `auto_map` names classes in Python files of the directory."""


def copy_companions(source: Path, target: Path, code: bool = False) -> None:
    """Copy the companions of a model.

    Args:
        source: the model directory.
        target: an existing directory.
        code: copy all its Python files, which config.json refers to.
    """
    names = companions(source)
    if code:
        names |= {path.name for path in source.glob("*.py")}
    for name in sorted(names):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def companions(directory: Path) -> set[str]:
    """Names of the companions in a model directory, the code of its tokenizer and processors included."""
    files = {
        path.relative_to(directory).as_posix()
        for pattern in COMPANIONS
        for path in directory.glob(pattern)
        if path.is_file()
    }
    return files | _code(directory)


def _code(directory: Path) -> set[str]:
    """Python files that tokenizer and processors name, and those that these import."""
    waiting = [module for name in _WITH_CODE for module in _named(directory / name)]
    names: set[str] = set()
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in names and is_inside(name) and (directory / name).is_file():
            names.add(name)
            waiting += _imported(directory / name)
    return names


def _named(path: Path) -> list[str]:
    """Modules in the `auto_map` of a JSON file: `module.Class`, or a list of such; `repository--module.Class` lies
    elsewhere."""
    try:
        auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map", {})
        values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    except (OSError, ValueError, AttributeError):
        return []
    references = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [
        reference.partition(".")[0]
        for reference in references
        if isinstance(reference, str) and "--" not in reference
    ]


def _imported(path: Path) -> list[str]:
    """Modules beside a Python file that it imports: `from .module import name`, `from . import module`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    modules: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            modules += [name.partition(".")[0] for name in names]
    return modules

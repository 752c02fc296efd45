"""Where a configuration value came from: a line of a YAML file, or a command-line flag.

Values are read with their marks, so that a problem found later, in whatever check, can still name its line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Loc = tuple[str | int, ...]
"""A value's place: keys and list indices from the root, as pydantic reports it."""


class Override(NamedTuple):
    """A value given on the command line, and the flag that gave it."""

    value: Any
    flag: str


Overrides = Mapping[Loc, Override]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `origin` is "file:line", a flag, or "" where neither is known."""

    origin: str
    where: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.origin, self.where, self.text) if part)


class ConfigError(ValueError):
    """The configuration cannot be used. Holds every problem found; the text has one a line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


def dotted(loc: Loc) -> str:
    """`("cluster", "nodes", 0, "host")` as `cluster.nodes[0].host`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".")


class Source:
    """A configuration's raw values, and where each stands."""

    def __init__(self, data: dict[str, Any], name: str, root: yaml.Node | None, overrides: Overrides) -> None:
        self.data = data
        self._name = name
        self._root = root
        self._overrides = overrides
        for loc, override in overrides.items():
            _put(data, loc, override.value)

    @classmethod
    def read(cls, path: Path, overrides: Overrides) -> Source:
        """Parse a YAML file of one document. Raises ConfigError if it cannot be read or parsed, or has a key twice."""
        first, *others = cls.read_all(path, overrides)
        if others:
            text = f"holds {1 + len(others)} documents, one is wanted; `perdure ctl apply` takes several"
            raise ConfigError([Problem(str(path), "", text)])
        return first

    @classmethod
    def read_all(cls, path: Path, overrides: Overrides) -> list[Source]:
        """Parse a YAML file, a source for each of its documents. Raises ConfigError as `read` does."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
            raise ConfigError([Problem(str(path), "", f"cannot be read: {reason}")]) from error
        try:
            roots = list(yaml.compose_all(text, Loader=yaml.SafeLoader)) or [None]
            documents = list(yaml.safe_load_all(text)) or [None]
        except yaml.MarkedYAMLError as error:
            raise ConfigError([_syntax_problem(path, error)]) from error
        except yaml.YAMLError as error:
            raise ConfigError([Problem(str(path), "", f"is not YAML: {error}")]) from error
        return [cls._of(path, root, data, overrides) for root, data in zip(roots, documents, strict=True)]

    @classmethod
    def _of(cls, path: Path, root: yaml.Node | None, data: Any, overrides: Overrides) -> Source:
        if data is None:
            data = {}
        if not isinstance(data, dict):
            line = root.start_mark.line + 1 if root is not None else 1
            raise ConfigError([Problem(f"{path}:{line}", "", "must hold a mapping of sections (cluster, model, …)")])
        doubled = [] if root is None else _doubled_keys(root, str(path))
        if doubled:
            raise ConfigError(doubled)
        return cls(data, str(path), root, overrides)

    @classmethod
    def empty(cls, overrides: Overrides) -> Source:
        """No file: defaults and flags only."""
        return cls({}, "", None, overrides)

    def problem(self, loc: Loc, text: str) -> Problem:
        """`text` about the value at `loc`, with the flag or the line that it came from."""
        return Problem(self._origin(loc), dotted(loc), text)

    def _origin(self, loc: Loc) -> str:
        override = self._overrides.get(loc)
        if override is not None:
            return override.flag
        if self._root is None:
            return self._name
        return f"{self._name}:{_line(self._root, loc)}"


def _put(data: dict[str, Any], loc: Loc, value: Any) -> None:
    """Set a value below `data`, making sections on the way; a section of a wrong type is left to the checks."""
    section: Any = data
    for part in loc[:-1]:
        if isinstance(section, dict) and section.get(part) is None:
            section[part] = {}
        section = section[part] if isinstance(section, dict) else None
    if isinstance(section, dict):
        section[loc[-1]] = value


def _line(root: yaml.Node, loc: Loc) -> int:
    """The line of the deepest part of `loc` that exists, counted from 1."""
    node, line = root, root.start_mark.line
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
        else:
            break
    return line + 1


def _doubled_keys(root: yaml.Node, name: str) -> list[Problem]:
    """YAML keeps the last of two equal keys without a word; people rarely mean that."""
    problems: list[Problem] = []
    nodes, seen = [root], set[int]()
    while nodes:
        node = nodes.pop()
        # An alias makes one node stand in many places, even inside itself.
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            nodes.extend(value for _, value in node.value)
            problems.extend(_doubled_here(node, name))
    return problems


def _doubled_here(node: yaml.MappingNode, name: str) -> Iterator[Problem]:
    first_line: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in first_line:
            yield Problem(f"{name}:{line}", key.value, f"stands here and on line {first_line[key.value]}")
        first_line.setdefault(key.value, line)


def _syntax_problem(path: Path, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    origin = f"{path}:{mark.line + 1}" if mark else str(path)
    return Problem(origin, "", f"is not YAML: {error.problem or error.context}")

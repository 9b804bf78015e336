"""Training examples as they come: JSON of three shapes, checked line by line and written in one canonical way."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from prefix_store.errors import InvalidTrainingData

EXPECTED = '{"prompt": "…", "completion": "…"}, {"messages": […]} or {"text": "…"}'
ROLES = ("system", "developer", "user", "assistant")
MESSAGE_FIELDS = ("role", "content", "name", "weight")
VALIDATION = "validation_examples"  # what a job calls those that it is judged by
MOST_EXAMPLES, MOST_BYTES, MOST_MESSAGES = 100_000, 64 << 20, 4096
FAULTS = 5  # told at a time
KINDS = {
    list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value", type(None): "null"
}  # fmt: skip
Example = dict[str, Any]


def canonical(example: Any) -> Example:
    """The example with its fields in order and nothing in it that says nothing. A field that is null is absent.

    `{"prompt", "completion"}`; `{"text"}`; or `{"messages"}` in OpenAI's chat shape, where an assistant's message whose
    `weight` is 0 is not learned. Raises InvalidTrainingData with what was expected and what came.
    """
    if not isinstance(example, Mapping):
        _refuse(f"expected an object {EXPECTED}, got {kind(example)}")
    given = {name: value for name, value in example.items() if value is not None}
    shape = next((shape for fields, shape in SHAPES.items() if set(given) == set(fields)), None)
    if shape is None:
        nulls = ", ".join(repr(str(name)[:40]) for name in example if name not in given)[:200]
        also = f", and null as {nulls}" if nulls else ""
        _refuse(f"expected an object {EXPECTED}, got {kind(given)}{also}{_beyond(given)}")
    return shape(given)


def to_jsonl(examples: Iterable[Any], param: str = "examples") -> bytes:
    """Canonical examples, one a line. Raises InvalidTrainingData with the line, counted from 1, or for too much."""
    lines, size = [], 0
    for number, example in enumerate(examples, start=1):
        try:
            text = json.dumps(canonical(example), ensure_ascii=False, separators=(",", ":"))
        except InvalidTrainingData as error:
            _refuse(f"{line_of(param)} {number}: {error.message}", param)
        lines.append(text.encode() + b"\n")
        size += len(lines[-1])
        if number > MOST_EXAMPLES:
            _refuse(f"there are more than {MOST_EXAMPLES:,} examples", param)
        if size > MOST_BYTES:
            _refuse(f"the examples up to line {number:,} take more than {MOST_BYTES >> 20} MB", param)
    return b"".join(lines)


def line_of(param: str) -> str:
    """How a line of one of a job's files is called."""
    return "line" if param == "examples" else f"{param}, line"


def from_jsonl(data: bytes) -> Iterator[Example]:
    """Reads what `to_jsonl` wrote, line by line."""
    return (json.loads(line) for line in io.BytesIO(data))


def parse(
    data: bytes, shape: Callable[[Any], Example] = canonical, most: int | None = None
) -> tuple[list[Example], list[str]]:
    """The examples of a JSONL file that somebody wrote, and what is wrong with its first bad lines: `line 3: …`.

    Blank lines are passed over. `shape` checks what a line holds, and raises InvalidTrainingData. More than `most`
    examples are wrong too, and the rest is not read.
    """
    found: list[Example] = []
    faults: list[str] = []
    for number, line in _numbered(data):
        if len(found) == most:
            faults.append(f"line {number}: there are more than {most:,} examples")
            break
        try:
            found.append(shape(loads(line)))
        except InvalidTrainingData as error:
            faults.append(f"line {number}: {error.message}")
            if len(faults) == FAULTS:
                break
    return found, faults


def read(data: bytes, param: str) -> list[Example]:
    """The examples of a whole JSONL file. Raises InvalidTrainingData, naming `param`, with the first bad lines."""
    found, faults = parse(data, most=MOST_EXAMPLES)
    if faults:
        _refuse("; ".join(faults), param)
    if not found:
        _refuse("the file has no examples", param)
    return found


def loads(line: bytes) -> Any:
    """A line's JSON. Raises InvalidTrainingData for none, and for a name that is given twice."""
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        _refuse(f"not JSON ({error.msg} at column {error.colno}); expected {EXPECTED}")
    except UnicodeDecodeError:
        _refuse(f"not UTF-8; expected {EXPECTED}")
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        _refuse(f"not JSON that can be read; expected {EXPECTED}")


def kind(value: Any) -> str:
    """What came, for people to read; never the value itself."""
    if isinstance(value, Mapping):
        return f"an object with {', '.join(repr(str(name)[:40]) for name in list(value)[:8]) or 'nothing'}"
    return KINDS.get(type(value), type(value).__name__)


def checked_text(name: str, value: Any) -> str:
    """A text that has something in it. Raises InvalidTrainingData."""
    if not _text(name, value):
        _refuse(f"{name} is empty")
    return str(value)


def _numbered(data: bytes) -> Iterator[tuple[int, bytes]]:
    """One by one: as a list, 64 MB of short lines would take a gigabyte."""
    return ((number, line.removesuffix(b"\n")) for number, line in enumerate(io.BytesIO(data), start=1) if line.strip())


def _object(pairs: list[tuple[str, Any]]) -> Example:
    names = [name for name, _ in pairs]
    if len(names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        _refuse(f"{twice[:40]!r} is given more than once")
    return dict(pairs)


def _pair(example: Example) -> Example:
    return {
        "prompt": _text("prompt", example["prompt"]),
        "completion": checked_text("completion", example["completion"]),
    }


def _plain(example: Example) -> Example:
    return {"text": checked_text("text", example["text"])}


def _conversation(example: Example) -> Example:
    messages = example["messages"]
    if not isinstance(messages, list):
        _refuse(f"messages must be a list, got {kind(messages)}")
    if len(messages) > MOST_MESSAGES:
        _refuse(f"messages must be at most {MOST_MESSAGES:,}, got {len(messages):,}")
    found = [_message(f"messages[{place}]", message) for place, message in enumerate(messages)]
    if not any(is_learned(message) for message in found):
        _refuse("no message of an assistant to learn from" + (", for all have weight 0" if _answers(found) else ""))
    if is_learned(found[0]):
        _refuse("messages[0] is an assistant's, and nothing stands before it to answer; give it the weight 0")
    return {"messages": found}


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether the tokens of a canonical message count in the loss."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _answers(messages: list[Example]) -> bool:
    return any(message["role"] == "assistant" for message in messages)


def _message(where: str, message: Any) -> Example:
    if not isinstance(message, Mapping):
        _refuse(f"{where} must be an object with role and content, got {kind(message)}")
    given = {name: value for name, value in message.items() if value is not None}
    for name in given:
        if name not in MESSAGE_FIELDS:
            _refuse(f"{where} has the field {str(name)[:40]!r}; known are {', '.join(MESSAGE_FIELDS)}")
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        came = repr(role[:40]) if isinstance(role, str) else kind(role)
        _refuse(f"{where}.role must be one of {', '.join(ROLES)}, got {came}")
    found: Example = {"role": role, "content": _content(f"{where}.content", given.get("content"))}
    if "name" in given:
        found["name"] = checked_text(f"{where}.name", given["name"])
    weight = given.get("weight", 1)
    if type(weight) is not int or weight not in (0, 1) or (role != "assistant" and "weight" in given):
        came = str(weight)[:40] if type(weight) in (int, float) else kind(weight)
        _refuse(f"{where}.weight must be 0 or 1 and stand in an assistant's message, got {came} in one of role {role}")
    if weight == 0:
        found["weight"] = 0
    if is_learned(found) and not str(found["content"]).strip():
        _refuse(f"{where}.content is empty, and an assistant's message is what is learned")
    return found


def _content(where: str, content: Any) -> str:
    """A text, or OpenAI's parts, which stand below one another as they do when they are served."""
    if not isinstance(content, list):
        return _text(where, content)
    for place, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            of = part.get("type") if isinstance(part, Mapping) else None
            came = f"a part of type {of[:40]!r}" if isinstance(of, str) else kind(part)
            _refuse(f"{where}[{place}] must be a part of type 'text', got {came}")
    return "\n".join(_text(f"{where}[{place}].text", part.get("text")) for place, part in enumerate(content))


def _beyond(given: Mapping[str, Any]) -> str:
    """The first field that a whole example has no use for."""
    for fields in SHAPES:
        more = [str(name) for name in given if name not in fields]
        if len(more) == len(given) - len(fields):
            return f"; {more[0][:40]!r} is no field beside {' and '.join(map(repr, fields))}"
    return ""


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        _refuse(f"{name} must be a text, got {kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        _refuse(f"{name} is not valid Unicode")
    return value


def _refuse(message: str, param: str = "examples") -> NoReturn:
    raise InvalidTrainingData(message, param=param)


# the fields that tell one shape from another
SHAPES: dict[tuple[str, ...], Callable[[Example], Example]] = {
    ("prompt", "completion"): _pair,
    ("messages",): _conversation,
    ("text",): _plain,
}

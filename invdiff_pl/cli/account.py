"""Condensing jsonargparse's account of a wrong argument to one line.

The account lists every type that was tried, even those that do not matter to a mistyped value.
"""

import re

_KEY = re.compile(r'Parser key "([^"]+)":?')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*))?$")
_GIVEN = re.compile(r"Given value: (.*)")
_IMPORT = re.compile(r"Expected a dot import path string: (.*)")
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a path but")


def one_line(account: str) -> str:
    """Condense an account to one sentence.

    Args:
        account: message of the parser's error, of one or many lines.

    Returns:
        the flag, the given value and what was expected, as far as the account states them; else the
        account itself, without line ends.
    """
    lines = _innermost([line for line in account.splitlines() if line.strip()])
    told = [line.strip().removeprefix("- ") for line in lines]
    if not told or not _KEY.match(told[0]):
        return " ".join(told)
    keys = [match[1] for line in told if (match := _KEY.match(line))]
    names = [match[1].rpartition(".")[2] for line in told if (match := _CLASS.match(line))]
    flag = "--" + ".".join(keys)
    if options := [match[1] for line in told if (match := _OPTION.match(line))]:
        return f"{flag}.{options[0]}: {names[-1]} has no such setting."
    if imported := [match[1] for line in told if (match := _IMPORT.match(line))]:
        return f"{flag}={imported[0]}: expected a class, as module.Class, or a YAML file."
    expected = [match for line in told if (match := _EXPECTED.match(line))]
    values = [match[2] for match in expected if match[2] is not None]
    values += [match[1] for line in told if (match := _GIVEN.match(line))]
    if expected and values:
        types = list(dict.fromkeys(_type_name(match[1]) for match in expected))
        return f"{flag}={values[0]}: expected {' or '.join(types)}."
    rest = [_CLASS.sub(r"\1", _KEY.sub("", line)) for line in told if not line.startswith(_NOISE)]
    return ": ".join([flag, *(line.strip(" :") for line in rest if line.strip(" :"))])


def _innermost(lines: list[str]) -> list[str]:
    """Return the lines that name keys up to the first class's problem, and that problem's own."""
    for number, line in enumerate(lines):
        if "Problem with given class_path" in line:
            depth = _depth(line)
            deeper = []
            for later in lines[number + 1 :]:
                if _depth(later) <= depth:
                    break
                deeper.append(later)
            heads = [head for head in lines[:number] if _KEY.match(head.strip())]
            return [*heads, line, *_innermost(deeper)]
    return lines


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _type_name(hint: str) -> str:
    """Return ``int`` for ``<class 'int'>``, the values of a Literal, and so on."""
    if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", hint):
        return f"one of {literal[1]}".replace("'", "")
    name = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", hint)
    return "null" if name == "NoneType" else name

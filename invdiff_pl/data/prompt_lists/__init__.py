"""Lists of prompts: those that ship with the package, and users' own."""

from importlib import resources
from pathlib import Path

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file

_COMMENT = "#"


def shipped() -> list[str]:
    """Return the names of the lists that ship with the package.

    Example:
        >>> shipped()
        ['celeba', 'faces', 'fairface', 'waterbirds', 'winobias']
    """
    files = resources.files(__name__).iterdir()
    return sorted(Path(each.name).stem for each in files if each.name.endswith(".txt"))


def read_prompts(given: str) -> tuple[str, ...]:
    """Read prompts from a shipped list, a text file, or the text itself.

    Args:
        given: name of a list, such as ``winobias``; a file with one prompt per line, in which empty
            lines and those that start with ``#`` do not count; or prompts separated by ``;``.

    Returns:
        the prompts in order, without repetition.

    Raises:
        InvDiffError: if there is no such list or file, or no prompt.

    Example:
        >>> read_prompts("a photo of a nurse; a photo of a pilot")
        ('a photo of a nurse', 'a photo of a pilot')
        >>> read_prompts("fairface")
        ('a photo of a man', 'a photo of a woman')
    """
    text = given.strip()
    if text in shipped():
        content = (resources.files(__name__) / f"{text}.txt").read_text(encoding="utf-8")
        lines = content.splitlines()
    elif ";" not in text and is_file(path := Path(text)):
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InvDiffError(f"prompts: {path} is not UTF-8 text ({error}).", "prompts") from None
    elif text and ";" not in text and (" " not in text or text.endswith(".txt")):
        raise InvDiffError(
            f"prompts={given!r}: there is no such file; expected one of the lists "
            f'{", ".join(shipped())}, a file of one prompt a line, or prompts as in "a; b".',
            "prompts",
        )
    else:
        lines = text.split(";")
    found = (line.strip() for line in lines if not line.strip().startswith(_COMMENT))
    prompts = tuple(dict.fromkeys(prompt for prompt in found if prompt))
    if not prompts:
        raise InvDiffError(f"prompts={given!r}: it holds no prompt.", "prompts")
    return prompts

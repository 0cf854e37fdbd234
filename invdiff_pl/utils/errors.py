"""The one exception type whose message is meant for the user."""

import re
from collections.abc import Mapping


class InvDiffError(ValueError):
    """Raised for bad input or a bad setting, with a message of one clear sentence.

    The message names the file, row, key or argument, what was expected, what was found and how to
    mend it. The command line prints it without a traceback, with its flags in place of the
    arguments (:func:`in_flags`), and exits with a non-zero status.

    Args:
        message: the message, which writes arguments as ``argument=value``, or as ```argument```
            in backticks if there is no value.
        arguments: the arguments that the message names, as they are called in the signature of the
            class or function; with the key, if it is a part of a mapping or an object that is
            wrong, as in ``adapter_settings.rank``.

    Attributes:
        arguments: the same.
    """

    def __init__(self, message: str, *arguments: str) -> None:
        super().__init__(message)
        self.arguments = arguments

    def in_flags(self, flags: Mapping[str, str]) -> "InvDiffError":
        """Return the same error with flags in place of the arguments.

        Args:
            flags: flags by argument, such as ``{"adapter": "--model.adapter"}``.
        """
        roots = {name: flags.get(name.split(".")[0]) for name in self.arguments}
        named = {
            name: ".".join([flag, *name.split(".")[1:]]) for name, flag in roots.items() if flag
        }
        return type(self)(in_flags(str(self), named)) if named else self


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """Replace the arguments that a text names by flags.

    Args:
        text: text that writes arguments as ``argument=`` or, in backticks, as ```argument```.
        flags: flags by argument; other arguments are left as they are.

    Examples:
        >>> in_flags("leave it out with broken=skip", {"broken": "--data.broken"})
        'leave it out with --data.broken=skip'
    """
    if not flags:
        return text
    names = "|".join(map(re.escape, flags))
    mentions = re.compile(rf"`({names})`|(?<![\w./`-])({names})(?==)")
    return mentions.sub(lambda found: flags[found[1] or found[2]], text)

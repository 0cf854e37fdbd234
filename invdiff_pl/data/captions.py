"""Making prompts from captions: one for all, by a mapping, or by words that captions hold."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from invdiff_pl.data.table_formats import column_names
from invdiff_pl.data.tables import place, read_table, reading, refuse
from invdiff_pl.utils.errors import InvDiffError

Captions = Literal["one", "first", "all"]
_WORDS = "words:"
_NAMED = 3


@dataclass(frozen=True)
class PromptRule:
    """How prompts are made from captions; at most one of the first three is given.

    Attributes:
        prompt: prompt of every image, whatever its caption, if not empty.
        prompt_map: file that gives the prompt of each caption: a JSON object, or a table whose
            first two columns are caption and prompt. Images with other captions are left out.
        prompts_from: ``captions``, or ``words:nurse,doctor``: an image's prompt is that of the one
            word that its caption holds, as a whole word in any case. Images with none of the words,
            or several, are left out.
        template: template that makes a prompt from a word, in the place of ``{}``.
        captions: ``one`` rejects an image with several captions, ``first`` takes its first, and
            ``all`` takes each of them.
    """

    prompt: str = ""
    prompt_map: Path | None = None
    prompts_from: str = "captions"
    template: str = "a photo of a {}"
    captions: Captions = "one"

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            InvDiffError: naming the argument that is wrong.
        """
        words = self.prompts_from != "captions"
        given = {
            "prompt": bool(self.prompt),
            "prompt_map": self.prompt_map is not None,
            "prompts_from": words,
        }
        names = [name for name, there in given.items() if there]
        if len(names) > 1:
            raise InvDiffError(
                f"`{names[0]}` and `{names[1]}` exclude each other: give one of them.", *names
            )
        if words and not self.words:
            raise InvDiffError(
                f"prompts_from={self.prompts_from}: expected captions, or words: and the "
                "words that make a prompt, such as words:nurse,doctor.",
                "prompts_from",
            )
        if self.template.count("{}") != 1:
            raise InvDiffError(
                f"prompt_template={self.template}: expected one {{}}, where the word stands.",
                "prompt_template",
            )

    @property
    def words(self) -> list[str]:
        """The words that make a prompt, without repetition."""
        if not self.prompts_from.startswith(_WORDS):
            return []
        words = self.prompts_from.removeprefix(_WORDS).split(",")
        return list(dict.fromkeys(word.strip() for word in words if word.strip()))


@dataclass(frozen=True)
class Prompted:
    """Images with their prompts.

    Attributes:
        rows: positions among the given rows, ascending.
        prompts: prompt of each row.
        left_out: number of images without a prompt.
        ambiguous: number of those whose captions hold several of the words.
    """

    rows: list[int]
    prompts: list[str]
    left_out: int
    ambiguous: int


def prompted(files: pd.Series, captions: pd.Series, rule: PromptRule, source: Path) -> Prompted:
    """Make the prompts of images from their captions.

    Args:
        files: file names, text ``[N]``; an image has a row for each of its captions.
        captions: text ``[N]``.
        rule: how prompts are made.
        source: table of both, to be named in errors.

    Raises:
        InvDiffError: if an image has several captions and the rule does not say which count, or the
            mapping cannot be read.
    """
    images = files.nunique()
    table = pd.DataFrame({"file": files.to_numpy(), "caption": captions.to_numpy()})
    repeated = table["file"].duplicated()
    if repeated.any() and rule.captions == "one" and not rule.prompt:
        _refuse_several(files, captions, source)
    if rule.captions == "first":
        table = table[~repeated]
    table = table.assign(prompt=_prompts_of(table["caption"], rule))
    table = table[table["prompt"].notna()].drop_duplicates(["file", "prompt"])
    ambiguous = 0
    if rule.words:
        several = table["file"].duplicated(keep=False) | (table["prompt"] == _SEVERAL)
        ambiguous = table["file"][several].nunique()
        table = table[~several]
    return Prompted(
        rows=table.index.tolist(),
        prompts=table["prompt"].tolist(),
        left_out=images - table["file"].nunique(),
        ambiguous=ambiguous,
    )


# Stands for captions that hold more than one of the words; no prompt, since it is blank.
_SEVERAL = " "


def _prompts_of(captions: pd.Series, rule: PromptRule) -> pd.Series:
    """Return the prompt of each caption, missing if it has none."""
    if rule.prompt:
        return pd.Series(rule.prompt.strip(), index=captions.index)
    if rule.prompt_map is not None:
        return captions.map(read_prompt_map(rule.prompt_map))
    if not rule.words:
        return captions
    holds = pd.DataFrame(
        {
            word: captions.str.contains(rf"(?<!\w){re.escape(word)}(?!\w)", case=False)
            for word in rule.words
        }
    )
    prompts = [rule.template.replace("{}", word) for word in rule.words]
    found = holds.idxmax(axis=1).map(dict(zip(rule.words, prompts, strict=True)))
    count = holds.sum(axis=1)
    return found.where(count > 0).mask(count > 1, _SEVERAL)


def read_prompt_map(path: Path) -> dict[str, str]:
    """Read the prompt of each caption from a JSON object, or the first two columns of a table.

    Raises:
        InvDiffError: if the file cannot be read, or gives one caption two prompts.
    """
    if path.suffix.lower() == ".json":
        with reading(path):
            try:
                content = json.loads(path.read_text(encoding="utf-8-sig"))
            except json.JSONDecodeError as error:
                raise InvDiffError(f"{path} is not valid JSON ({error}).") from None
        if isinstance(content, dict) and all(isinstance(v, str) for v in content.values()):
            return {caption.strip(): prompt.strip() for caption, prompt in content.items()}
        raise InvDiffError(
            f'{path} maps no captions to prompts: expected {{"caption": "prompt", …}}.'
        )
    with reading(path):
        columns = column_names(path)
    if len(columns) < 2:
        raise InvDiffError(
            f"{path} has {len(columns)} columns: expected two, caption and prompt, below a header."
        )
    table = read_table(path, columns[:2])
    captions, prompts = table[columns[0]], table[columns[1]]
    again = captions.duplicated() & ~table.duplicated()
    refuse(again, captions, columns[0], "a caption that no row above gives another prompt", path)
    return dict(zip(captions, prompts, strict=True))


def _refuse_several(files: pd.Series, captions: pd.Series, source: Path) -> None:
    again = files.duplicated().to_numpy()
    second = int(again.argmax())
    name = files.iloc[second]
    first = int((files == name).to_numpy().argmax())
    at = [place(source, int(files.index[row])) for row in (first, second)]
    more = f" ({int(again.sum()) - 1} other rows also repeat a file)" if again.sum() > 1 else ""
    mend = "remove one of the rows"
    if captions.iloc[first] != captions.iloc[second]:
        mend += (
            ", or take the first caption of each image with captions=first or all of them "
            "with captions=all"
        )
    raise InvDiffError(
        f"{source}, {at[0]} and {at[1]} both name {name!r}{more}: {mend}.", "captions"
    )


def left_out_by_prompt(found: Sequence[Prompted], rule: PromptRule, kept: int) -> str | None:
    """Say how many images have no prompt; ``None`` if all have one."""
    count = sum(each.left_out for each in found)
    if not count:
        return None
    if not rule.words:
        return f"{count} images whose caption {rule.prompt_map} does not name are left out"
    ambiguous = sum(each.ambiguous for each in found)
    several = f", {ambiguous} of them because it holds several" if ambiguous else ""
    words = ", ".join(rule.words[:_NAMED]) + (", …" if len(rule.words) > _NAMED else "")
    return (
        f"{kept} images whose caption holds one of the words ({words}) are kept, {count} others "
        f"are left out{several}"
    )

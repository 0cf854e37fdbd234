"""Readers and targets of an audit, as texts name them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from invdiff_pl.data.images import read_images
from invdiff_pl.metrics.classifier import CONFIG_FILE
from invdiff_pl.metrics.network_readers import ClipReader, ImageClassifierReader, VqaReader
from invdiff_pl.metrics.readers import AttributeReader, CheckedReader, ClassifierReader
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file

_FORM = '"NAME: CLASS; CLASS", where CLASS may be NAME=TEXT'


def parse_attribute(text: str) -> tuple[str, dict[str, str]]:
    """An attribute and the text of each of its classes.

    Example:
        >>> parse_attribute("gender: a woman; man = a man in a photo")
        ('gender', {'a woman': 'a woman', 'man': 'a man in a photo'})

    Raises:
        InvDiffError: if it is not of that form, or names a class twice.
    """
    name, colon, rest = text.partition(":")
    classes: dict[str, str] = {}
    for part in (part.strip() for part in rest.split(";")):
        label, equals, told = (each.strip() for each in part.partition("="))
        if not label or (equals and not told) or label in classes:
            colon = ""
        classes[label] = told or label
    if not colon or not name.strip():
        raise InvDiffError(f"{text!r}: expected {_FORM}, each class once.")
    return name.strip(), classes


def parse_targets(texts: Sequence[str]) -> dict[str, list[float]]:
    """Wanted shares by attribute.

    Example:
        >>> parse_targets(["gender: 0.3; 0.7"])
        {'gender': [0.3, 0.7]}

    Raises:
        InvDiffError: if one is not of that form.
    """
    found = {}
    for text in texts:
        name, colon, rest = text.rpartition(":")
        try:
            found[name.strip()] = [float(share) for share in rest.split(";")]
        except ValueError:
            colon = ""
        if not colon:
            raise InvDiffError(
                f'{text!r}: expected "NAME: SHARE; SHARE", such as "gender: 0.3; 0.7".'
            )
    return found


def make_readers(
    classifiers: Sequence[Sequence[str]] = (),
    clip: Sequence[Sequence[str]] = (),
    vqa: Sequence[Sequence[str]] = (),
    device: torch.device | str = "cpu",
) -> list[AttributeReader]:
    """Readers, each on the device.

    Args:
        classifiers: of each its folder and, if wanted, an attribute as :func:`parse_attribute`
            reads it: its name alone, or, of an image classifier of transformers, labels of the
            model by class (``age: young=0-2,3-9; old=more than 70``).
        clip: folder, and attribute with a phrase for each class.
        vqa: folder, attribute with an answer for each class, and question.
        device: of the networks.

    Raises:
        InvDiffError: naming what cannot be used.
    """
    readers: list[Any] = [_classifier(*words) for words in classifiers]
    for folder, text in clip:
        name, phrases = parse_attribute(text)
        readers.append(ClipReader(folder, phrases, name))
    for folder, text, question in vqa:
        name, answers = parse_attribute(text)
        readers.append(VqaReader(folder, question, answers, name))
    return [reader.to(device) for reader in readers]


def _classifier(folder: str, text: str = "attribute", *more: str) -> AttributeReader:
    if more:
        raise InvDiffError(f"classifier {folder!r}: expected at most {_FORM} after its folder.")
    if is_file(Path(folder) / CONFIG_FILE):
        return ClassifierReader(folder, text)
    if ":" not in text:
        return ImageClassifierReader(folder, name=text)
    name, classes = parse_attribute(text)
    groups = {label: [each.strip() for each in told.split(",")] for label, told in classes.items()}
    return ImageClassifierReader(folder, groups, name)


def check_readers(
    readers: Sequence[AttributeReader], table: str | Path, resolution: int
) -> list[AttributeReader]:
    """Readers with their errors on labelled pictures, where a table labels their attribute.

    Args:
        readers: any.
        table: CSV with a column ``file``, of paths relative to its folder, and a column by the name
            of each attribute, of class names.
        resolution: at which pictures are read, in pixels.

    Raises:
        InvDiffError: if the table or a picture cannot be read, or a label is no class.
    """
    path = Path(table)
    try:
        rows = pd.read_csv(path, dtype=str)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InvDiffError(
            f"labelled={str(path)!r} cannot be read as a CSV table: {reason}"
        ) from None
    if "file" not in rows or not len(rows):
        raise InvDiffError(f"labelled={str(path)!r}: expected a column 'file', and rows below it.")
    files = [path.parent / name for name in rows["file"]]
    parts = torch.arange(len(files)).split(64)
    checked: list[AttributeReader] = []
    for reader in readers:
        if reader.name not in rows:
            checked.append(reader)
            continue
        labels = _labels(rows[reader.name], reader.classes, path)
        pictures = (read_images([files[row] for row in part], resolution) for part in parts)
        checked.append(CheckedReader(reader, pictures, labels))
    return checked


def _labels(column: "pd.Series[str]", classes: Sequence[str], path: Path) -> torch.Tensor:
    numbers: Mapping[str, int] = {name: number for number, name in enumerate(classes)}
    for row, label in enumerate(column, start=2):
        if label not in numbers:
            raise InvDiffError(
                f"{path}, line {row}, column {column.name!r}: {label!r} is none of the classes "
                f"{', '.join(classes)}."
            )
    return torch.tensor([numbers[label] for label in column])

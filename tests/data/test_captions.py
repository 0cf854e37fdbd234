"""Captions that hardly repeat: what makes prompts of them, and what is left out."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from invdiff_pl.data.captions import Prompted, PromptRule, prompted, read_prompt_map
from invdiff_pl.data.index import ImageIndex
from invdiff_pl.data.scarce import without_rare_prompts
from invdiff_pl.utils.errors import InvDiffError

NURSE, DOCTOR = "a photo of a nurse", "a photo of a doctor"
CAPTIONS = (
    "A nurse in a hall",
    "two Nurses",  # another word
    "the doctor, laughing",
    "a doctor and a nurse",  # both
    "a nurse-like figure",  # a word of its own beside a hyphen
    "a tree",
)


def _prompted(captions, rule: PromptRule, files=None) -> Prompted:
    names = files or [f"{number}.png" for number in range(len(captions))]
    index = range(2, len(captions) + 2)
    table = pd.Series(names, index=index, dtype="str"), pd.Series(captions, index=index)
    return prompted(*table, rule, Path("metadata.csv"))


def test_whole_words_make_prompts_and_the_rest_is_counted() -> None:
    found = _prompted(CAPTIONS, PromptRule(prompts_from="words:nurse, doctor"))
    assert found.rows == [0, 2, 4]
    assert found.prompts == [NURSE, DOCTOR, NURSE]
    assert (found.left_out, found.ambiguous) == (3, 1)


def test_words_may_be_several_and_take_a_template() -> None:
    rule = PromptRule(prompts_from="words:fire truck,c++", template="{}, at work")
    found = _prompted(["A Fire Truck", "truck", "c++ code"], rule)
    assert found.prompts == ["fire truck, at work", "c++, at work"]


def test_words_are_looked_for_in_all_captions_of_an_image() -> None:
    files = ["a", "a", "b", "b", "c", "c"]
    captions = ["a nurse", "a person", "a nurse", "a doctor", "a nurse", "the nurse"]
    found = _prompted(
        captions, PromptRule(prompts_from="words:nurse,doctor", captions="all"), files
    )
    assert (found.rows, found.prompts) == ([0, 4], [NURSE, NURSE])
    assert (found.left_out, found.ambiguous) == (1, 1)


def test_the_first_or_all_captions_of_an_image_count() -> None:
    files, captions = ["a", "b", "a", "a"], ["x", "y", "z", "x"]
    first = _prompted(captions, PromptRule(captions="first"), files)
    assert (first.rows, first.prompts) == ([0, 1], ["x", "y"])
    every = _prompted(captions, PromptRule(captions="all"), files)
    assert (every.rows, every.prompts) == ([0, 1, 2], ["x", "y", "z"])


def test_one_prompt_is_given_to_all_whatever_their_captions() -> None:
    found = _prompted(["x", "y", "z"], PromptRule(prompt=" a photo "), ["a", "b", "a"])
    assert (found.rows, found.prompts, found.left_out) == ([0, 1], ["a photo"] * 2, 0)


@pytest.mark.parametrize("name", ["map.csv", "map.json", "map.tsv"])
def test_a_mapping_gives_prompts_and_leaves_out_other_captions(name: str, tmp_path) -> None:
    pairs = {"a nurse, smiling": NURSE, "the doctor": DOCTOR}
    path = tmp_path / name
    if path.suffix == ".json":
        path.write_text(json.dumps(pairs))
    else:
        table = pd.DataFrame({"caption": list(pairs), "prompt": list(pairs.values())})
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    found = _prompted(["the doctor", "a tree", "a nurse, smiling"], PromptRule(prompt_map=path))
    assert (found.rows, found.prompts, found.left_out) == ([0, 2], [DOCTOR, NURSE], 1)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("m.json", "[]", "maps no captions to prompts"),
        ("m.json", '{"a": 1}', "maps no captions to prompts"),
        ("m.json", "{", "not valid JSON"),
        ("m.csv", "caption\nx\n", "has 1 columns: expected two"),
        ("m.csv", "caption,prompt\nx,a\nx,b\n", "line 3: caption is 'x', expected a caption that"),
    ],
)
def test_a_mapping_that_cannot_be_read_is_told(
    name: str, content: str, told: str, tmp_path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvDiffError, match=told):
        read_prompt_map(tmp_path / name)
    with pytest.raises(InvDiffError, match=r"nowhere\.csv is missing"):
        read_prompt_map(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"prompt": "x", "prompts_from": "words:a"}, "^`prompt` and `prompts_from` exclude each"),
        ({"prompts_from": "nurse,doctor"}, "expected captions, or words: and the words"),
        ({"prompts_from": "words: ,"}, "expected captions, or words: and the words"),
        ({"template": "a photo"}, r"^prompt_template=a photo: expected one \{\}"),
    ],
)
def test_rules_that_make_no_sense_are_refused(settings, told: str) -> None:
    with pytest.raises(InvDiffError, match=told):
        PromptRule(**settings)


def _index(*counts: int, in_test: int = 1) -> ImageIndex:
    """An index with so many training images of each prompt, and some for testing."""
    prompts = [p for p, count in enumerate(counts) for _ in range(count + in_test)]
    splits = [2 * (n >= count) for count in counts for n in range(count + in_test)]
    names = tuple(f"{number}.png" for number in range(len(prompts)))
    titles = tuple(f"prompt {number}" for number in range(len(counts)))
    return ImageIndex(Path("data"), names, titles, torch.tensor(prompts), torch.tensor(splits))


def test_prompts_of_few_images_are_left_out_of_every_split_and_named() -> None:
    index = _index(3, 8, 0, 9)
    rest, rows, told = without_rare_prompts(index, 8)
    assert rest.prompts == ("prompt 1", "prompt 3")
    assert rest.prompt_ids.tolist() == [0] * 9 + [1] * 10
    assert rest.files == tuple(index.files[row] for row in rows.tolist())
    assert told is not None
    assert "2 of 4 prompts have fewer than 8 images" in told
    assert "'prompt 0' (3), 'prompt 2' (0)" in told


def test_where_most_images_would_be_left_out_nothing_is_run() -> None:
    with pytest.raises(InvDiffError, match=r"occur once each, 9 captions of 18 images.*none"):
        without_rare_prompts(_index(*[1] * 9), 8)
    with pytest.raises(InvDiffError, match=r"captions hardly repeat.* and 1 with 8 images.*words:"):
        without_rare_prompts(_index(9, *[1] * 12), 8)
    with pytest.raises(
        InvDiffError, match=r"10 images to train on, of 2 prompts, and none.*or low"
    ):
        without_rare_prompts(_index(6, 4), 8)
    with pytest.raises(InvDiffError, match=r"6 images to train on of its one prompt 'prompt 0'"):
        without_rare_prompts(_index(6), 8)


def test_enough_images_are_left_as_they_are() -> None:
    index = _index(8, 9)
    rest, rows, told = without_rare_prompts(index, 8)
    assert rest is index
    assert rows.tolist() == list(range(len(index)))
    assert told is None

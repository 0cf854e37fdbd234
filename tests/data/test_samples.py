"""Manifests of samples, and where samples lie."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from invdiff_pl.data.samples import Sample, manifest_text, read_manifest, sample_file
from invdiff_pl.utils.errors import InvDiffError

SAMPLE = Sample("scale-0.00/000000.png", 0, "a photo", 0, 0.0, 1, 2.0, 20, "DDIMScheduler")


@pytest.mark.parametrize("scale", [0.0, 1.0, 0.25, -1.5, 12.0])
def test_names_of_samples_are_safe_on_every_file_system(scale: float) -> None:
    for index in (0, 999_999, 12_345_678):
        for part in sample_file(scale, index).parts:
            assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*[a-z0-9]", part)
            assert len(part) < 64


@pytest.mark.parametrize(
    "prompt",
    ["../../x", "CON", "a/b\\c:d*e?", "\n\r\t\0", "\u2028 line \x85 separators", "鳥" * 500],
)
def test_any_prompt_comes_back_from_a_manifest(prompt: str, tmp_path: Path) -> None:
    sample = replace(SAMPLE, prompt=prompt)
    (tmp_path / "manifest.jsonl").write_text(manifest_text([sample, SAMPLE]), encoding="utf-8")
    assert read_manifest(tmp_path) == [sample, SAMPLE]


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../outside.png"},
        {"file": "/etc/passwd"},
        {"file": "scale-0.00\\..\\x.png"},
        {"file": "a\0b"},
        {"index": "0"},
        {"index": True},
        {"prompt": None},
        {"steps": 2.5},
        {"more": 1},
    ],
)
def test_a_line_that_was_tampered_with_is_named(change: dict, tmp_path: Path) -> None:
    lines = [json.dumps(asdict(SAMPLE)), json.dumps({**asdict(SAMPLE), **change})]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InvDiffError, match=r"manifest\.jsonl, line 2 is damaged"):
        read_manifest(tmp_path)

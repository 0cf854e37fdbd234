"""The Python of README and of exported model cards, run word for word."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from adapter_cases import KINDS, run_folder
from PIL import Image

import invdiff_pl as inv
from invdiff_pl.cli.export import export
from invdiff_pl.environments.hidden_attribute import HiddenAttributeSettings

REPOSITORY = Path(__file__).parents[2]


def _run_blocks(text: str) -> list[Any]:
    """Run every Python block, each by itself; returns the values of their last lines."""
    values = []
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        *lines, last = ast.parse(block).body
        assert isinstance(last, ast.Expr)
        names: dict[str, Any] = {}
        exec(compile(ast.Module(lines, []), "block", "exec"), names)
        values.append(eval(compile(ast.Expression(last.value), "block", "eval"), names))
    return values


def test_every_python_block_of_the_readme_draws_a_picture(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "runs" / "waterbirds" / "mini", "asset:waterbirds", "lora")
    (tmp_path / "invdiff_pl").mkdir()
    (tmp_path / "invdiff_pl" / "assets").symlink_to(REPOSITORY / "invdiff_pl" / "assets")
    # Word for word, but with fewer drawings, a short search, two steps of training and no
    # calibration.
    monkeypatch.setattr(inv.generate, "__defaults__", (16,))
    few = HiddenAttributeSettings(starts=4, values=(), alpha=0.2, resamples=4)
    quick = {**(inv.discover.__kwdefaults__ or {}), "settings": few}
    monkeypatch.setattr(inv.discover, "__kwdefaults__", quick)
    fewer = {**(inv.debias.__kwdefaults__ or {}), "steps": 2, "calibration_samples": 0}
    monkeypatch.setattr(inv.debias, "__kwdefaults__", fewer)
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    pictures = _run_blocks(text)
    assert len(pictures) == text.count("```python") >= 2
    for picture in pictures:
        assert isinstance(picture, Image.Image)
        assert picture.size == (32, 32)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_python_block_of_an_exported_card_draws_a_picture(
    kind, tiny_backbone, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_folder(tmp_path / "run", tiny_backbone, kind)
    environments = run / "environments" / "environments.json"
    prompt = r"a \"photo\" of a “mallard”, 50 %"
    environments.write_text(environments.read_text().replace("a photo of a mallard", prompt))
    export(run, Path("even") / "even birds")
    monkeypatch.chdir("even")
    pictures = _run_blocks(Path("even birds/README.md").read_text(encoding="utf-8"))
    assert len(pictures) == 2
    assert all(isinstance(picture, Image.Image) for picture in pictures)

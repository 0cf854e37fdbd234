"""``invdiff audit``: whole runs on a small pipeline, and each kind of bad input."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from invdiff_pl.cli.main import main
from invdiff_pl.data.prompt_lists import read_prompts, shipped
from invdiff_pl.metrics.readers import FunctionReader
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_json
from invdiff_pl.workflow.audit_inputs import check_readers, parse_attribute, parse_targets


def audit(backbone: Path, output: Path, *more: str) -> int:
    settings = ["--per-prompt=4", "--steps=1", "--batch-size=8", f"--output={output}"]
    prompts = [] if "--prompts" in more else ["--prompts", "a photo of a mallard; a raven"]
    return main(["audit", f"--backbone={backbone}", *prompts, *settings, *more])


def test_an_audit_by_classifier_and_clip_writes_table_figures_and_page(
    tiny_backbone, classifier, weights, tmp_path, capsys
) -> None:
    readers = ["--classifier", str(classifier), "place"]
    readers += ["--clip", str(weights / "clip"), "kind: water bird=a mallard; land bird=a raven"]
    status = audit(tiny_backbone, tmp_path / "out", *readers, "--guidance-scales", "1", "3")
    assert status == 0
    told = read_json(tmp_path / "out" / "audit.json")
    assert {each["attribute"] for each in told["figures"]} == {"place", "kind", "place × kind"}
    assert told["figures"][0]["errors_taken_out"] is not None
    assert told["settings"]["backbone"] == str(tiny_backbone)
    output = capsys.readouterr().out
    assert "place, before, guidance scale 3: Bias" in output
    assert str(tmp_path / "out" / "audit.html") in output


def test_an_audit_without_a_reader_counts_inferred_environments(
    tiny_backbone, tmp_path, capsys
) -> None:
    assert audit(tiny_backbone, tmp_path / "out", "--per-prompt=12") == 0
    assert "Environments were inferred" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--prompts", " ; "], "--prompts=' ; ': it holds no prompt"),
        (["--prompts", "nothing.txt"], "there is no such file; expected one of the lists celeba"),
        (["--lora", "style.bin"], "no such file"),
        (["--clip", "nowhere", "gender: a man; a woman"], "cannot load the CLIP model 'nowhere'"),
        (["--clip", "nowhere", "gender"], 'expected "NAME: CLASS; CLASS"'),
        (["--vqa", "nowhere", "a: b; c", "what?"], "cannot load 'nowhere' as a VQA model"),
        (["--classifier", "nowhere"], "cannot load 'nowhere' as an image classifier"),
        (["--target", "gender=0.5"], 'expected "NAME: SHARE; SHARE"'),
        (["--scheduler", "Fast"], "diffusers has no scheduler of that name"),
    ],
)
def test_bad_input_is_told_in_one_line(more, told, tiny_backbone, tmp_path, capsys) -> None:
    assert audit(tiny_backbone, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_loras_that_are_pickles_or_of_another_architecture_are_refused(
    tiny_backbone, tmp_path, capsys
) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "style.bin")
    save_file({"unet.nothing.lora_A.weight": torch.zeros(2, 3)}, tmp_path / "other.safetensors")
    for name, told in (("style.bin", "pickles"), ("other.safetensors", "does not fit")):
        status = audit(tiny_backbone, tmp_path / "out", "--lora", str(tmp_path / name))
        assert status == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: --lora=")
        assert told in error


def test_shipped_lists_hold_prompts_and_winobias_its_forty_professions() -> None:
    lists = {name: read_prompts(name) for name in shipped()}
    assert all(len(prompts) > 1 for prompts in lists.values())
    assert len(lists["winobias"]) == 40
    assert "a photo of the face of an auditor" in lists["winobias"]


def test_prompts_are_read_from_a_file_line_by_line(tmp_path) -> None:
    file = tmp_path / "my prompts.txt"
    file.write_text("\ufeffa nurse\n\n# people\n  a pilot; in uniform \na nurse\n", "utf-8")
    assert read_prompts(str(file)) == ("a nurse", "a pilot; in uniform")
    file.write_text("# nothing\n")
    with pytest.raises(InvDiffError, match="holds no prompt"):
        read_prompts(str(file))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvDiffError, match="not UTF-8"):
        read_prompts(str(file))


def test_a_single_prompt_longer_than_a_file_name_is_not_taken_for_a_file() -> None:
    prompt = "a photo of a nurse in a very long corridor " * 10
    assert read_prompts(prompt) == (prompt.strip(),)


@pytest.mark.parametrize("text", ["", "gender", "gender: a; a", ": a; b", "gender: a=; b", "g: a;"])
def test_attributes_that_are_not_of_the_form_are_refused(text: str) -> None:
    with pytest.raises(InvDiffError, match="each class once"):
        parse_attribute(text)


def test_targets_are_numbers_by_attribute() -> None:
    assert parse_targets(["a: 0.3; 0.7", "b × c: 1;2"]) == {"a": [0.3, 0.7], "b × c": [1, 2]}


def test_a_table_of_labelled_pictures_gives_a_readers_errors(tmp_path) -> None:
    for name, level in (("a.png", 0), ("b.png", 255), ("c.png", 255)):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / name)
    table = tmp_path / "labels.csv"
    table.write_text("file,light\na.png,dark\nb.png,bright\nc.png,dark\n")

    def bright(images: torch.Tensor) -> torch.Tensor:
        return (images.float().mean((1, 2, 3)) > 127).long()

    readers = [FunctionReader(bright, ["dark", "bright"], name) for name in ("light", "other")]
    light, other = check_readers(readers, table, 8)
    assert light.confusion.tolist() == [[1, 1], [0, 1]]  # type: ignore[attr-defined]
    assert other is readers[1]
    table.write_text("file,light\na.png,grey\n")
    with pytest.raises(InvDiffError, match="line 2, column 'light': 'grey' is none of the classes"):
        check_readers(readers, table, 8)
    with pytest.raises(InvDiffError, match="cannot be read as a CSV table"):
        check_readers(readers, tmp_path / "none.csv", 8)

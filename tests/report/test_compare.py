"""Several runs in one table."""

import csv
import json
from pathlib import Path

import pytest

from invdiff_pl.cli.main import main
from invdiff_pl.report.blocks import Strong
from invdiff_pl.report.compare import compare, latex, run_names, table

NOTHING = {"before": None, "after": None, "reason": "no weights"}


def _report(bias: tuple[float, float, float], distance: float = 400.0, n: int = 64) -> dict:
    mean, *ends = bias
    figures = {"mean": mean, "interval": ends}
    before = {"mean": 0.9, "interval": [0.85, 0.95]}
    facts = {"extractor": "efficientnet_lite0", "resize": 96, "n": n, "reference_images": 100}
    recall = {"before": 0.5, "after": 0.6, "neighbours": 3, "extractor": "efficientnet_lite0"}
    return {
        "bias": {"attribute": "background", "before": before, "after": figures},
        "prompt_accuracy": {"before": 0.99, "after": 0.98, "interval_after": [0.97, 0.99]},
        "frechet_distance": {**facts, "before": 450.0, "after": distance},
        "distances": {"fid": NOTHING},
        "precision": recall,
        "recall": recall,
        "clip_t": NOTHING,
        "environments": {"auc": 0.999},
        "seconds": {"total": 430.0},
    }


def _cells(reports: list[dict], title: str) -> list[str]:
    content = table([str(n) for n in range(len(reports))], compare(reports))
    (place,) = [n for n, name in enumerate(content.header) if name.startswith(title)]
    return [row[place] for row in content.rows]


def test_the_best_is_marked_where_its_interval_is_apart() -> None:
    cells = _cells(
        [_report((0.1, 0.05, 0.15)), _report((0.3, 0.2, 0.4))], "Bias (background) after"
    )
    assert cells == ["0.100 [0.050, 0.150]", "0.300 [0.200, 0.400]"]
    assert [isinstance(cell, Strong) for cell in cells] == [True, False]


def test_nothing_is_marked_where_intervals_overlap_or_there_is_none() -> None:
    reports = [_report((0.1, 0.05, 0.25), 300), _report((0.3, 0.2, 0.4), 400)]
    for title in ("Bias (background) after", "Bias (background) before", "Fréchet", "seconds"):
        assert not any(isinstance(cell, Strong) for cell in _cells(reports, title))


def test_the_best_must_be_apart_from_every_other_one() -> None:
    ends = [(0.3, 0.28, 0.32), (0.1, 0.05, 0.15), (0.14, 0.1, 0.2)]
    cells = _cells([_report(each) for each in ends], "Bias (background) after")
    assert not any(isinstance(cell, Strong) for cell in cells)


def test_distances_taken_otherwise_stand_in_columns_of_their_own() -> None:
    reports = [_report((0.1, 0.0, 0.2)), _report((0.1, 0.0, 0.2), n=512)]
    names = [column.name for column in compare(reports) if column.name.startswith("Fréchet")]
    assert names == [
        "Fréchet distance (efficientnet_lite0 at 96, 64 against 100)",
        "Fréchet distance (efficientnet_lite0 at 96, 512 against 100)",
    ]
    assert _cells(reports, names[0]) == ["400.00", "–"]


def test_names_leave_out_what_all_have_in_common(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "mini", tmp_path / "b" / "mini"]
    assert run_names(folders) == ["a/mini", "b/mini"]
    assert run_names(folders[:1]) == ["mini"]


def test_latex_escapes_names_and_marks_the_best() -> None:
    columns = compare([_report((0.1, 0.05, 0.15)), _report((0.3, 0.2, 0.4))])
    text = latex(["50%_{#1}", "other"], columns)
    assert r"50\%\_\{\#1\} & " in text
    assert r"\textbf{0.100 [0.050, 0.150]}" in text
    assert r"Fr\'echet distance" in text
    assert text.count(r"\\") == 3


def test_the_command_prints_and_writes_tables(tmp_path: Path, capsys) -> None:
    for name, bias in (("one", (0.1, 0.05, 0.15)), ("two", (0.3, 0.2, 0.4))):
        file = tmp_path / name / "report" / "report.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(_report(bias)))
    words = ["compare", str(tmp_path / "one"), str(tmp_path / "two")]
    written = [tmp_path / "out.csv", tmp_path / "out.tex"]
    assert main([*words, f"--csv={written[0]}", f"--latex={written[1]}"]) == 0
    assert "| **0.100 [0.050, 0.150]** |" in capsys.readouterr().out
    one, two = list(csv.DictReader(written[0].open(newline="")))
    assert float(one["Bias (background) after"]) == 0.1
    assert float(two["Bias (background) after high"]) == 0.4
    assert written[1].read_text().startswith(r"\begin{tabular}")


def test_a_folder_without_a_report_is_named(tmp_path: Path, capsys) -> None:
    assert main(["compare", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "report.json" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("figure", ["prompt_accuracy", "frechet_distance"])
def test_figures_that_a_run_lacks_are_dashes(figure: str) -> None:
    lacking = {**_report((0.1, 0.0, 0.2)), figure: NOTHING}
    title = "prompt accuracy" if figure == "prompt_accuracy" else "Fréchet"
    assert _cells([_report((0.1, 0.0, 0.2)), lacking], title)[1] == "–"

"""The table and plot of a sweep."""

from typing import Any

from PIL import Image

from invdiff_pl.report.pareto import mark_pareto, plot_sweep, sweep_markdown


def _point(run: str, scale: float, bias: float, distance: float | None) -> dict[str, Any]:
    return {
        "run": run,
        "guidance_scale": 1.0,
        "invariant_scale": scale,
        "bias": bias,
        "bias_interval": [bias - 0.05, bias + 0.05],
        "prompt_accuracy": 0.99,
        "frechet_distance": distance,
        "precision": 0.7,
        "recall": None,
    }


def test_points_that_another_beats_in_both_are_off_the_curve() -> None:
    points = [
        _point("a", 0.0, 0.9, 40.0),
        _point("a", 0.5, 0.4, 42.0),
        _point("a", 0.7, 0.4, 43.0),
        _point("a", 1.0, 0.1, 50.0),
        _point("a", 1.2, 0.2, 60.0),
        _point("a", 1.4, 0.0, None),
        # Of another run, so it beats none of these.
        _point("b", 1.0, 0.0, 1.0),
    ]
    mark_pareto(points)
    marks = [point["pareto"] for point in points]
    assert marks == [True, True, False, True, False, False, True]


def test_table_and_plot_show_every_point(tmp_path) -> None:
    points = [_point("a|b", 0.0, 0.9, 40.0), _point("a|b", 1.0, 0.1, None)]
    mark_pareto(points)
    text = sweep_markdown(points)
    assert "| a\\|b | 1 | 0 | 0.900 [0.850, 0.950] | 40.00 | 99.0 % | 0.700 | – | * |" in text
    assert "| a\\|b | 1 | 1 | 0.100 [0.050, 0.150] | – |" in text
    plot_sweep(points, tmp_path / "sweep.png")
    assert min(Image.open(tmp_path / "sweep.png").size) > 100

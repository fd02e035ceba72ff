from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedlp_jax.data import partition
from fedlp_jax.errors import FedLPError
from fedlp_jax.reporting import plots

LABELS = np.random.default_rng(0).integers(0, 10, 2000)


def _rows(rounds: int, every: int = 1, upload: int = 2_000_000) -> list[dict]:
    return [
        {
            "round": r,
            "upload_bytes": upload,
            "train_loss": 1 / r,
            "test_accuracy": 0.1 * r if r % every == 0 else None,
        }
        for r in range(1, rounds + 1)
    ]


def _bars(axes) -> np.ndarray:
    return np.array([bar.get_height() for bar in axes.patches])


def test_a_few_clients_are_drawn_one_by_one():
    dealt = partition.dirichlet(LABELS, clients=5, alpha=1.0)
    mixes, sizes = dealt.plot().axes[:2]
    shares = _bars(mixes).reshape(10, 5)
    np.testing.assert_allclose(shares.T, dealt.histogram / dealt.sizes[:, None])
    assert _bars(sizes).tolist() == dealt.sizes.tolist()
    assert sizes.get_xlabel() == "client"
    assert "2,000 examples of 10 classes on 5 clients" in mixes.get_title()


def test_of_many_clients_50_are_drawn_and_all_are_counted():
    dealt = partition.iid(LABELS, clients=2000)
    mixes, sizes = plots.partition(dealt).axes[:2]
    assert len(mixes.patches) == 10 * 50
    assert _bars(sizes).sum() == 2000
    assert "client (50 of them" in mixes.get_xlabel()
    assert mixes.get_title().endswith("2,000 clients; 1 each")


def test_sizes_that_differ_very_much_are_on_a_logarithmic_axis():
    wide = partition.quantity(LABELS, clients=60, alpha=0.05).plot().axes[1]
    assert wide.get_xscale() == "log"
    assert _bars(wide).sum() == 60
    narrow = partition.quantity(LABELS, clients=60, alpha=50.0).plot().axes[1]
    assert narrow.get_xscale() == "linear"
    assert _bars(narrow).sum() == 60


def test_many_classes_get_a_scale_and_few_a_legend():
    many = partition.iid(np.arange(300) % 30, clients=3).plot()
    assert [axes.get_ylabel() for axes in many.axes] == ["share of examples", "examples", "class"]
    tops = {
        round(bar.get_y() + bar.get_height(), 9)
        for bar in many.axes[0].patches
        if bar.get_y() + bar.get_height() > 1 - 1e-9
    }
    assert tops == {1.0}
    few = partition.iid(LABELS, clients=3).plot()
    assert [text.get_text() for text in few.legends[0].get_texts()] == [
        str(c) for c in reversed(range(10))
    ]


@pytest.mark.parametrize("clients", [1, 10, 50, 51, 2000])
def test_a_partition_is_written_at_six_by_four_inches(tmp_path, clients):
    path = tmp_path / "new" / "partition.png"
    partition.iid(LABELS, clients=clients).plot(path)
    with Image.open(path) as picture:
        assert picture.size == (900, 600)
        assert len(picture.convert("RGB").getcolors(10**6)) > 20


def test_curves_show_the_rounds_that_were_evaluated():
    figure = plots.curves({"a": _rows(6, every=2), "b": _rows(3)})
    (axes,) = figure.axes
    first, second = axes.get_lines()
    assert first.get_xdata().tolist() == [2, 4, 6]
    np.testing.assert_allclose(first.get_ydata(), [0.2, 0.4, 0.6])
    assert second.get_xdata().tolist() == [1, 2, 3]
    assert first.get_color() != second.get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("round", "test accuracy")
    figure.draw_without_rendering()
    assert axes.get_yticklabels()[0].get_text().endswith("%")


def test_the_last_tick_is_at_the_last_round():
    for rounds in (1, 3, 60, 199, 200, 1013):
        (axes,) = plots.curves({"a": _rows(rounds), "b": _rows(1)}).axes
        ticks = axes.get_xticks()
        assert (ticks[0], ticks[-1]) == (0, rounds)
        assert np.diff(ticks).min() > 0.5 * np.diff(ticks).max()


def test_a_line_has_a_marker_of_its_own_on_some_points():
    axes = plots.curves({"a": _rows(200), "b": _rows(5)}).axes[0]
    first, second = axes.get_lines()
    assert first.get_marker() != second.get_marker()
    assert (first.get_markevery(), second.get_markevery()) == (25, 1)


def test_several_runs_of_a_label_are_a_mean_with_a_band():
    runs = [
        [row | {"test_accuracy": row["test_accuracy"] + shift} for row in _rows(5, upload=upload)]
        for shift, upload in ((0.0, 10**6), (0.1, 2 * 10**6), (0.2, 3 * 10**6))
    ]
    (axes,) = plots.curves({"a": runs}, x="upload_megabytes").axes
    (line,) = axes.get_lines()
    np.testing.assert_allclose(line.get_xdata(), [2, 4, 6, 8, 10])
    np.testing.assert_allclose(line.get_ydata(), [0.2, 0.3, 0.4, 0.5, 0.6])
    (band,) = axes.collections
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert (low, high) == pytest.approx((0.2 - 0.1, 0.6 + 0.1))
    (axes,) = plots.curves({"a": [_rows(3), _rows(5)]}).axes
    assert axes.get_lines()[0].get_xdata().tolist() == [1, 2, 3]


class _History:
    """As `fedlp_jax.simulation.result.History` looks from here."""

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, key):
        return [row[key] for row in self.rows]


class _Result:
    def __init__(self, rows):
        self.history = _History(rows)


@pytest.mark.parametrize("kind", [_Result, _History, tuple])
def test_a_run_may_be_a_result_a_history_or_rows(kind):
    rows = _rows(3)
    (axes,) = plots.curves({"one": kind(rows), "two": [kind(rows), kind(_rows(5))]}).axes
    one, two = axes.get_lines()
    assert one.get_xdata().tolist() == two.get_xdata().tolist() == [1, 2, 3]
    assert len(axes.collections) == 1  # the band of the two


def test_a_notebook_shows_the_picture():
    assert plots.curves({"a": _rows(2)})._repr_png_().startswith(b"\x89PNG")


def test_uploads_of_rounds_without_a_test_count():
    (axes,) = plots.curves({"a": _rows(6, every=2)}, x="upload_megabytes").axes
    assert axes.get_lines()[0].get_xdata().tolist() == [4.0, 8.0, 12.0]
    assert axes.get_xlabel() == "uploaded by all clients so far [MB]"


def test_one_run_needs_no_legend_and_a_loss_no_percent():
    figure = plots.curves({"a": _rows(3)}, y="train_loss")
    (axes,) = figure.axes
    assert axes.get_legend() is None
    figure.draw_without_rendering()
    assert "%" not in axes.get_yticklabels()[0].get_text()


def test_many_runs_stay_apart_and_their_legend_inside_the_picture():
    figure = plots.curves({f"a run with a long name, number {i}": _rows(3) for i in range(12)})
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_curves_are_written_in_the_format_of_the_ending(tmp_path, ending):
    path = tmp_path / f"curves.{ending}"
    plots.curves({"a": _rows(3)}, path)
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("histories", "options", "message"),
    [
        ({}, {}, "no history to draw"),
        ({"a": _rows(2)}, {"x": "rounds"}, r"x='rounds' is not an axis; did you mean 'round'\?"),
        (
            {"a": _rows(2)},
            {"y": "test_acuracy"},
            r"a: none of 2 rounds has 'test_acuracy'; did you mean 'test_accuracy'\? They have: ",
        ),
        ({"a": []}, {}, "none of 0 rounds has 'test_accuracy'. They have: nothing"),
        ({"a": [{"round": 1, "test_accuracy": None}]}, {}, "none of 1 rounds has"),
        (
            {"a": [{"round": 1, "test_accuracy": 0.5}]},
            {"x": "upload_megabytes"},
            "a: round 1 has no upload_bytes",
        ),
        ({"a": _rows(2)}, {"path": "curve.xyz"}, "picture curve.xyz cannot be written: .*xyz"),
        ({"a": [_rows(1), _rows(2)[1:]]}, {}, "a: its 2 runs have no round in common"),
        (
            {"a": "runs/a-1"},
            {},
            "a: 'runs/a-1' is neither a run nor a list of runs; pass the Result",
        ),
        ({"a": [_rows(1), {"round": 1}]}, {}, "a: .* is neither a run nor a list of runs"),
    ],
)
def test_what_cannot_be_drawn_is_refused(histories, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FedLPError, match=message):
        plots.curves(histories, **options)


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("")
    picture = tmp_path / "curve.png"
    picture.symlink_to(tmp_path / "precious")
    plots.curves({"a": _rows(2)}, picture)
    assert picture.is_file() and not picture.is_symlink()
    assert (tmp_path / "precious").read_text() == ""
    assert {path.name for path in tmp_path.iterdir()} == {"precious", "curve.png"}


def test_pdf_fonts_are_type_42_and_settings_stay(tmp_path):
    import matplotlib

    before = matplotlib.rcParams["pdf.fonttype"]
    plots.curves({"a": _rows(2)}, tmp_path / "curve.pdf")
    content = (tmp_path / "curve.pdf").read_bytes()
    assert b"/Type3" not in content and b"/CIDFontType2" in content
    assert matplotlib.rcParams["pdf.fonttype"] == before


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FedLPError, match="cannot be written"):
        plots.curves({"a": _rows(2)}, tmp_path / "file" / "curve.png")


def test_matplotlib_is_imported_by_drawing_only_and_pyplot_never():
    program = (
        "import sys; from fedlp_jax import plots; assert 'matplotlib' not in sys.modules; "
        "plots.curves({'a': [{'round': 1, 'test_accuracy': 0.5}]}); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(plots.__file__).parents[2]
    environment = {"PYTHONPATH": str(root), "PATH": "", "JAX_PLATFORMS": "cpu", "HOME": "/tmp"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_a_sweep_is_drawn_without_the_runs_that_diverged(tmp_path):
    def rows(key):
        return [{"round": r, key: 0.5, "upload_bytes": 1} for r in (1, 2)]

    plots.draw_sweep(tmp_path, {"a": [rows("test_loss")] * 2, "b": [rows("train_loss")]})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "loss_by_round.png",
        "loss_by_upload_megabytes.png",
    ]
    plots.draw_sweep(tmp_path / "none", {"b": [rows("train_loss")]})
    assert not (tmp_path / "none").exists()

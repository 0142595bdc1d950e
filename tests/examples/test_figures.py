"""The claims of docs/figures.md, on the numbers of the full runs that it shows and on short runs of the programs."""

import json
import statistics

import pytest
import torch

from tests.support.processes import ROOT

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("scipy", reason="SciPy is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")

import digits_ablation
import gradients_by_layer
import methods_compared
import tabular
import unit_gradient_norm
import value_surfaces

from report import parse_arguments

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = ROOT / "docs"
PROGRAMS = {
    module.__name__: module
    for module in (
        value_surfaces, gradients_by_layer, unit_gradient_norm, digits_ablation, methods_compared, tabular
    )
}  # fmt: skip


def page_text():
    return " ".join((DOCS / "figures.md").read_text().split())


def numbers(name):
    return json.loads((DOCS / "figures" / f"{name}.json").read_text())


def rows_of(results, **wanted):
    found = [row for row in results if all(row[key] == value for key, value in wanted.items())]
    assert found, wanted
    return found


def table_of(name):
    full = numbers(name)
    further = {"value_surfaces": "exact", "methods_compared": "costs"}
    return PROGRAMS[name].table(full["results"], *([full[further[name]]] if name in further else []))


@pytest.mark.parametrize("name", PROGRAMS)
def test_page_shows_the_numbers_of_the_full_run(name):
    """The table of the full run, with its picture, from at least three seeds."""
    page = (DOCS / "figures.md").read_text()
    assert table_of(name) in page
    assert f"](figures/{name}.png)" in page
    picture = (DOCS / "figures" / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 200_000
    settings = numbers(name)["settings"]
    assert len(set(settings["seeds"])) >= 3
    assert not settings["quick"]
    assert f"`examples/{name}.py`" in page


def test_page_has_the_processor_time():
    minutes = sum(numbers(name)["processor_seconds"] for name in PROGRAMS) / 60
    assert minutes < 30
    assert f"in {minutes:.0f} minutes of processor time" in (DOCS / "figures.md").read_text()


def test_a_repeated_seed_is_run_once(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["figure", "--seeds", "3", "1", "3", "--out", str(tmp_path)])
    assert parse_arguments("", "").seeds == [3, 1]


@pytest.mark.parametrize("data", value_surfaces.DATA)
def test_penalty_estimates_the_distance_and_clipping_does_not(data):
    full = numbers("value_surfaces")
    exact = full["exact"][data]
    for row in rows_of(full["results"], data=data, method="clipping"):
        assert row["estimate"] < 0.5 * exact
        assert row["estimate_by_largest_norm"] < 0.75 * exact  # nor when it is scaled to Lipschitz constant 1
    for row in rows_of(full["results"], data=data, method="penalty"):
        assert row["estimate"] == pytest.approx(exact, rel=0.15)


def test_page_says_how_many_estimates_are_off_by_more_than_a_tenth():
    full = numbers("value_surfaces")
    errors = [
        abs(row["estimate"] / full["exact"][row["data"]] - 1) for row in rows_of(full["results"], method="penalty")
    ]
    missed = [error for error in errors if error > 0.1]
    assert (len(errors), len(missed)) == (9, 1)
    assert f"10 %, which one of the nine misses (25 Gaussians, {100 * missed[0]:.0f} %)" in page_text()


@pytest.mark.parametrize("data", value_surfaces.DATA)
def test_level_sets_follow_the_data_under_the_penalty(data):
    results = numbers("value_surfaces")["results"]
    clipped = [row["above_surroundings"] for row in rows_of(results, data=data, method="clipping")]
    penalised = [row["above_surroundings"] for row in rows_of(results, data=data, method="penalty")]
    assert min(penalised) > max(clipped)


def test_critics_had_converged():
    """The losses of the last two of ten parts of the training hardly differ."""
    for row in numbers("value_surfaces")["results"]:
        *_, before, last = row["critic_loss"]
        assert last == pytest.approx(before, rel=0.05), row


def test_gradients_explode_and_vanish_under_clipping_alone():
    results = numbers("gradients_by_layer")["results"]
    wanted = {
        "penalty": (-0.05, 0.05),
        "clipping at 0.1": (0.1, 4),
        "clipping at 0.01": (-2, -0.1),
        "clipping at 0.001": (-4, -0.1),
    }
    for name, (low, high) in wanted.items():
        for row in rows_of(results, method=name):
            assert low < row["slope_in_decades_per_layer"] < high, row


def test_clipped_weights_are_at_the_bounds():
    results = numbers("gradients_by_layer")["results"]
    for row in results:
        if row["method"] == "penalty":
            assert row["share_at_the_bounds"] < 1e-4
        else:
            assert row["share_at_the_bounds"] > 0.05


@pytest.mark.parametrize("penalty", unit_gradient_norm.PENALTIES)
def test_norms_are_one_after_training(penalty):
    full = numbers("unit_gradient_norm")
    results = rows_of(full["results"], penalty=penalty)
    for before in rows_of(results, step=0):
        assert before["share_within_a_tenth_of_1"] < 0.25
    for after in rows_of(results, step=full["settings"]["steps"]):
        assert after["median_norm"] == pytest.approx(1, abs=0.1)
        assert after["share_within_a_tenth_of_1"] > 0.75
        assert after["mean_cosine"] > 0.95


def test_norms_balance_penalty_and_critic_loss():
    """Not at 1 + W / 20: the penalty's lines join any two samples, not matched ones."""
    torch.manual_seed(0)
    length = (
        (unit_gradient_norm.eight_gaussians(10_000) - unit_gradient_norm.one_gaussian(10_000)).norm(dim=1).mean().item()
    )
    full = numbers("unit_gradient_norm")
    for row in rows_of(full["results"], step=full["settings"]["steps"]):
        assert row["median_norm"] == pytest.approx(1 + length / 20, abs=0.004)
        assert row["median_norm"] > 1 + row["wasserstein_exact"] / 20 + 0.008
    assert f"L = {length:.2f} on average" in page_text()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_converges_under_the_penalty_and_is_small_from_the_start_under_clipping(seed):
    results = numbers("digits_ablation")["results"]
    (row,) = rows_of(results, method="penalty", seed=seed)
    losses = [-loss for loss in row["critic_loss"]]
    assert max(losses[-20:]) < 0.25 * losses[0]
    assert max(losses[-20:]) < 1.5 * min(losses[-20:])
    for name in ("clipping", "clipping, 10 times the rate"):
        (row,) = rows_of(results, method=name, seed=seed)
        assert max(-loss for loss in row["critic_loss"]) < 0.02


def frechet(name):
    results = numbers("digits_ablation")["results"]
    return [row["frechet_distance"] for row in rows_of(results, method=name)]


@pytest.mark.parametrize("name", ["clipping", "clipping, 10 times the rate", "penalty, BatchNorm"])
def test_digits_are_better_under_the_penalty_without_batch_norm(name):
    """Compared seed by seed, since each seed has its own judge."""
    for plain, layer_norm, other in zip(frechet("penalty"), frechet("penalty, LayerNorm"), frechet(name), strict=True):
        assert max(plain, layer_norm) < other


@pytest.mark.parametrize("method", ["compiled", "directional"])
def test_methods_differ_less_than_seeds(method):
    results = numbers("methods_compared")["results"]
    for window, share in (("first tenth", 0.1), ("all", 1)):
        (ours,) = rows_of(results, method=method, window=window)
        (seeds,) = rows_of(results, method="another seed", window=window)
        assert max(ours["distance"]) < share * min(seeds["distance"])


def test_generated_table_is_near_the_real_one():
    results = numbers("tabular")["results"]
    for seed in numbers("tabular")["settings"]["seeds"]:
        (before,) = rows_of(results, rows="before", seed=seed)
        (after,) = rows_of(results, rows="after", seed=seed)
        assert after["mean_marginal_distance"] < 0.5 * before["mean_marginal_distance"]
        assert after["mean_correlation_error"] < 0.5 * before["mean_correlation_error"]


def test_short_training_estimates_the_distance_under_the_penalty_alone():
    found = {name: value_surfaces.run("8 Gaussians", name, 0, steps=60)[0] for name in ("clipping", "penalty")}
    assert found["clipping"]["estimate"] < 0.1
    assert found["penalty"]["estimate"] > 0.4
    assert found["penalty"]["above_surroundings"] > found["clipping"]["above_surroundings"] + 0.05


def test_exact_distance_of_a_translation_is_its_length():
    """In whatever order the two sets of samples come."""
    real = torch.randn(100, 2)
    partner, distance = value_surfaces.optimal_coupling(real, real[torch.randperm(100)] + torch.tensor([3.0, 4.0]))
    assert distance == pytest.approx(5, rel=1e-6)
    assert sorted(partner.tolist()) == list(range(100))


def test_short_training_of_deep_critics_keeps_gradients_under_the_penalty_alone():
    found = {name: gradients_by_layer.run(name, 0, steps=10) for name in gradients_by_layer.BOUNDS}
    slopes = {name: row["slope_in_decades_per_layer"] for name, row in found.items()}
    assert slopes["clipping at 0.001"] < slopes["clipping at 0.01"] < -0.1
    assert slopes["clipping at 0.1"] > 0.1
    assert abs(slopes["penalty"]) < 0.05
    assert found["clipping at 0.01"]["share_at_the_bounds"] > 0.5
    assert found["penalty"]["share_at_the_bounds"] < 1e-4


def test_short_training_brings_norms_near_one():
    results = unit_gradient_norm.run(0, steps=100)
    for penalty in unit_gradient_norm.PENALTIES:
        (before,) = rows_of(results, penalty=penalty, step=0)
        (after,) = rows_of(results, penalty=penalty, step=100)
        assert before["share_within_a_tenth_of_1"] < 0.25
        assert after["share_within_a_tenth_of_1"] > 0.5
        assert after["mean_cosine"] > 0.9


@pytest.fixture(scope="module")
def judge(one_thread):
    return digits_ablation.SampleQuality(0)


def test_judge_tells_digits_from_noise(judge):
    """And one digit from ten."""
    best = judge.of_real_digits()
    noise = 2 * torch.rand(500, 64).double().numpy() - 1
    assert best["score"] > 2 * judge.score(noise)
    assert best["frechet_distance"] < 0.1 * judge.frechet(noise)
    assert judge.score(judge.training[:1].repeat(500, 0)) == pytest.approx(1)
    assert judge.frechet(judge.held_out) == pytest.approx(0, abs=1e-2)


@pytest.mark.filterwarnings("ignore:.*batch normalisation:UserWarning")
@pytest.mark.parametrize("name", digits_ablation.METHODS)
def test_digits_critic_trains_by_every_method(name, judge):
    numbers, samples = digits_ablation.run(name, 0, 3, judge)
    assert statistics.mean(numbers["critic_loss"]) < 0
    assert samples[3].shape == (digits_ablation.SAMPLES, 1, 8, 8)


def test_short_training_by_two_methods_differs_less_than_by_two_seeds():
    curves = {
        (method, seed): methods_compared.train(method, seed, steps=3)
        for method, seed in (("double_backward", 0), ("directional", 0), ("double_backward", 1))
    }
    ours, directional, other = map(torch.tensor, curves.values())
    assert (ours - directional).abs().mean() < 1e-4 * (ours - other).abs().mean()


def test_short_training_improves_the_generated_table():
    results, rows = tabular.run(0, steps=50)
    (before,) = rows_of(results, rows="before")
    (after,) = rows_of(results, rows="after")
    assert after["mean_marginal_distance"] < 0.8 * before["mean_marginal_distance"]
    assert rows["after"].shape == rows["before"].shape

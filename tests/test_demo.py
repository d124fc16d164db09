"""The demo, in its quick form: that what it writes is there, loads, and is what the table says."""

import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from matplotlib.image import imread
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

import hf_modular.demo
from hf_modular.cli import app
from hf_modular.demo import digits, report, training
from hf_modular.demo.run import make_room, run, worker_map

TRAINED = {  # method -> trained parameters
    "linear probe": 96 * 10 + 10,
    "LoRA r=1": 4 * (4 * 2 * 96 + 2 * (96 + 192)),
    "SSF": 4 * (4 * 2 * 96 + 2 * 192 + 2 * 96),
    "LoRA r=9": 9 * 5376,
    "HUT r=8": 8 * 5376 + 5376,
    "full fine-tuning": 301_536,
}
MERGED = {"merge: average": "average", "merge: task arithmetic": "task-arithmetic", "merge: DARE, p=0.9": "dare"}


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("demo") / "output"
    done = CliRunner().invoke(app, ["demo", "--output", str(folder), "--quick"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    results = json.loads((folder / "results.json").read_text())
    return SimpleNamespace(
        folder=folder, out=done.stdout, results=results, rows={row["method"]: row for row in results["rows"]}
    )


def accuracy(model: torch.nn.Module, task: str) -> float:
    return training.share(training.is_correct(model, digits.load()["test"].seen_as(task)))


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForImageClassification.from_pretrained(folder)


def test_the_table_has_every_method_with_its_parameters(demo: SimpleNamespace) -> None:
    head, _, *lines = demo.out.strip().split("\n\n")[0].splitlines()
    assert head.split() == ["method", "trainable", *demo.rows["base"]["accuracy"], "mean", "CPU", "s"]
    counts = {"base": 0, **TRAINED, **dict.fromkeys(MERGED, 0)}
    assert len(lines) == len(counts)
    for line, (name, count) in zip(lines, counts.items(), strict=True):
        assert line.startswith(name)
        cells = line.removeprefix(name).split()
        shown = [f"{100 * value:.1f}" for value in demo.rows[name]["accuracy"].values()]
        assert cells[: 1 + len(shown)] == [f"{count:,}", *shown]
        assert cells[1 + len(shown)] == f"{100 * demo.rows[name]['mean_accuracy']:.1f}"


@pytest.mark.parametrize("method", ["ssf", "hut-r8", "lora-r1", "lora-r9"])
def test_the_adapters_load_and_are_as_good_as_the_table_says(demo: SimpleNamespace, method: str) -> None:
    name = next(m.name for m in training.METHODS if m.folder == f"adapters/{method}")
    for task, stated in demo.rows[name]["accuracy"].items():
        base = load(demo.folder / "models/base")
        model = PeftModel.from_pretrained(base, str(demo.folder / f"adapters/{method}-{task}"))
        assert accuracy(model, task) == pytest.approx(stated)


@pytest.mark.parametrize(("name", "folder"), MERGED.items())
def test_the_merged_models_load_alone_and_are_as_good_as_the_table_says(
    demo: SimpleNamespace, name: str, folder: str
) -> None:
    model = load(demo.folder / "merged" / folder)
    first = demo.rows[name]["mean_accuracy_per_seed"][0]
    tasks = demo.rows[name]["accuracy"]
    assert sum(accuracy(model, task) for task in tasks) / len(tasks) == pytest.approx(first)


def test_the_merged_model_is_what_the_chosen_scale_gives(demo: SimpleNamespace) -> None:
    settings = demo.rows["merge: task arithmetic"]["settings"]
    assert max(settings["validation"]) == demo.rows["merge: task arithmetic"]["validation_accuracy"]
    base, merged = (
        load_file(demo.folder / f / "model.safetensors") for f in ("models/base", "merged/task-arithmetic")
    )
    tuned = [
        load_file(demo.folder / f"models/full-{task}/model.safetensors") for task in demo.rows["base"]["accuracy"]
    ]
    for name, value in merged.items():
        expected = base[name] + settings["scale"] * sum(model[name] - base[name] for model in tuned)
        torch.testing.assert_close(value, expected)


def test_random_merges_are_run_with_several_seeds(demo: SimpleNamespace) -> None:
    assert len(demo.rows["merge: DARE, p=0.9"]["mean_accuracy_per_seed"]) == demo.results["settings"]["masks"] == 2
    assert " ± " in next(line for line in demo.out.splitlines() if line.startswith("merge: DARE"))


def test_the_head_is_shared(demo: SimpleNamespace) -> None:
    base, tuned = (load_file(demo.folder / f"models/{name}/model.safetensors") for name in ("base", "full-rotated"))
    probe = load_file(demo.folder / "models/probe-rotated/model.safetensors")
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert moved
    assert not any(name.startswith("classifier") for name in moved)
    assert {name for name in base if not torch.equal(base[name], probe[name])} == {
        "classifier.bias",
        "classifier.weight",
    }


def test_cards(demo: SimpleNamespace) -> None:
    adapter = ModelCard.load(demo.folder / "adapters/hut-r8-rotated/README.md")
    assert adapter.data.library_name == "peft"
    assert "697 images" in adapter.text
    stated = demo.rows["HUT r=8"]["accuracy"]["rotated"]
    assert adapter.data.eval_results[0].metric_value == pytest.approx(stated, abs=1e-4)
    merged = ModelCard.load(demo.folder / "merged/dare/README.md")
    assert "merge_method: dare" in merged.text
    assert {result.dataset_config for result in merged.data.eval_results} == set(demo.rows["base"]["accuracy"])


def test_the_chart_shows_something(demo: SimpleNamespace) -> None:
    pixels = imread(demo.folder / "chart.png")  # (height, width, 4)
    assert pixels.shape[0] > 800
    assert pixels.shape[1] > 1200
    assert pixels[..., :3].std() > 0.05


# ---- its parts


def test_the_parts_of_the_data_have_nothing_in_common() -> None:
    parts = digits.load()
    assert {name: len(part) for name, part in parts.items()} == digits.SIZES
    assert sum(digits.SIZES.values()) == 1797
    rows = [tuple(image.flatten().tolist()) for part in parts.values() for image in part.images]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("view", digits.VIEWS)
def test_a_view_changes_the_images_and_no_label(view: str) -> None:
    part = digits.load()["val"]
    seen = part.seen_as(view)
    assert seen.images.shape == part.images.shape
    assert not torch.equal(seen.images, part.images)
    assert torch.equal(seen.labels, part.labels)


def job(folder: Path, base: Path, seed: int) -> training.Job:
    return training.Job("HUT r=8", "mirrored", base, folder, epochs=0.1, seed=seed)


def test_the_same_seed_gives_the_same_bits(demo: SimpleNamespace, tmp_path: Path) -> None:
    bases = [tmp_path / name for name in ("one", "same", "other")]
    for folder, seed in zip(bases, (0, 0, 1), strict=True):
        training.train_base(folder, epochs=1, seed=seed)
    one, same, other = (load_file(folder / "model.safetensors") for folder in bases)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])
    jobs = [job(tmp_path / str(i), bases[0], seed) for i, seed in enumerate((0, 0, 1))]
    first, again, third = ((training.fine_tune(j), load_file(j.folder / "adapter_model.safetensors"))[1] for j in jobs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_work_goes_to_other_processes_and_comes_back_in_order() -> None:
    with worker_map(2, start=int) as over:
        assert list(over(abs, [-1, 2, -3])) == [1, 2, 3]
        assert over is not map


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"new or empty folder.*thesis\.txt"):
        run(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_an_earlier_demo_wrote_is_removed(tmp_path: Path) -> None:
    (tmp_path / "merged/stale").mkdir(parents=True)
    (tmp_path / "chart.png").write_bytes(b"old")
    (tmp_path / "results.json").write_text("old")
    make_room(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_without_its_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib and sklearn: pip install 'hf_modular\[demo\]'"):
        importlib.reload(hf_modular.demo)


def row(name: str, right: float, *, seeds: int = 1, **more: object) -> report.Row:
    """A row with a certain share of 500 images right, the same ones for each task."""
    runs = [{task: torch.arange(500) < 500 * right + seed for task in ("a", "b")} for seed in range(seeds)]
    return report.Row(name, 5, runs, 1.0, 0.5, {}, **more)


def rows(ours: float) -> Iterator[report.Row]:
    yield row("base", 0.5, one_model=True)
    yield from (row(name, 0.9) for name in ("linear probe", "LoRA r=1", "LoRA r=9", "full fine-tuning"))
    yield from (row(name, ours) for name in ("SSF", "HUT r=8"))
    yield row("merge: DARE, p=0.9", 0.7, seeds=3, one_model=True)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (0.8, "HUT r=8 is worse than LoRA r=9 at 5 trained parameters each: -10.0 ± 2.6 points."),
        (0.9, "HUT r=8 and LoRA r=9 cannot be told apart at 5 trained parameters each: +0.0 ± 0.0 points."),
        (0.95, "HUT r=8 is better than LoRA r=9 at 5 trained parameters each: +5.0 ± 1.9 points."),
    ],
)
def test_the_notes_say_who_is_worse(ours: float, verdict: str) -> None:
    assert verdict in report.notes(list(rows(ours)))


def test_the_notes_say_what_merging_gains_and_loses() -> None:
    (note,) = (note for note in report.notes(list(rows(0.8))) if note.startswith("merge"))
    assert "+20.2 ± 3.5 points against the base" in note
    assert "-19.8 ± 3.5 points against one fine-tuned model per task" in note


def test_the_table_shows_the_spread_over_seeds() -> None:
    assert "70.2 ± 0.2" in report.table(list(rows(0.8)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: no module"),
        ("torchao", "Failed to load _C.so"),
        ("torch.utils._pytree", "<enum 'Kind'> is an Enum subclass"),
    ],
)
def test_only_one_message_of_each_is_kept_back(name: str, message: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(name)
    logger.warning(message)
    logger.warning("Another message")
    assert [record.message for record in caplog.records] == ["Another message"]

"""Merging a 0.55B Llama and three fine-tunes, beside mergekit and the file system's own speed.

    make peers                                             # mergekit in an environment of its own
    python benchmarks/make_models.py /dev/shm/merge-bench
    python benchmarks/merge.py /dev/shm/merge-bench
    python benchmarks/merge.py /dev/shm/merge-bench --methods ties --rounds 1   # the other rows stay as they are
    python benchmarks/merge.py /dev/shm/merge-bench --methods opcm   # minutes of singular values, so only if asked for
    python benchmarks/merge.py /dev/shm/merge-bench --memory /dev/shm/small /dev/shm/large   # peaks at several sizes

Whole processes, imports included, interleaved over several rounds: a method's ratio is the median over the rounds of
mergekit's figure by ours in the same round. Where mergekit sorts, it runs once; what it has not, runs alone. The floor
reads every input byte once and writes every output byte once, in two threads. In the comparison ours neither notes
hashes nor reads its result again, as mergekit does neither; "with hashes" is our default in the first of these.
`wrong` is the share of output elements that are not the correctly rounded result, on one tensor.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / ".peers" / "mergekit" / "bin" / "mergekit-yaml"
PARAMETERS = {
    "linear": {"normalize": True},
    "task_arithmetic": {"normalize": False},
    "dare_linear": {"normalize": False},
    "ties": {"normalize": True},
    "pcb": {},
    "fisher": {},
    "opcm": {},
}
OURS_ONLY = ("pcb", "fisher", "opcm")
DEFAULT = [name for name in PARAMETERS if name != "opcm"]
ONCE = ("ties",)  # mergekit takes minutes
WITHOUT_BASE = ("linear", "fisher")
MODEL_PARAMETERS = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.3},
    "dare_linear": {"weight": 0.3, "density": 0.1},
    "ties": {"weight": 0.5, "density": 0.2},
}


def recipe(method: str, folder: Path) -> str:
    """A recipe that both programs read."""
    models = [
        {"model": str(folder / f"model{i}"), "parameters": MODEL_PARAMETERS.get(method, {})}
        for i in range(1, 1 + len(list(folder.glob("model[0-9]"))))
    ]
    if method == "fisher":
        for i, model in enumerate(models, 1):
            model["fisher"] = str(folder / f"fisher{i}")
    whole = {"merge_method": method, "models": models, "parameters": PARAMETERS[method], "dtype": "bfloat16"}
    if method not in WITHOUT_BASE:
        whole["base_model"] = str(folder / "base")
    return json.dumps(whole)  # JSON is YAML


def run(command: list[str], log: Path) -> dict[str, float]:
    """Wall and CPU seconds and peak resident memory of one process and what it starts."""
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return {
        "wall": time.perf_counter() - start,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6,
    }


def floor(folder: Path, method: str, output: Path) -> float:
    """Seconds to read every input byte and to write every output byte, in two threads."""
    names = [f"model{i}" for i in range(1, 4)] + ([] if method in WITHOUT_BASE else ["base"])
    names += [f"fisher{i}" for i in range(1, 4)] if method == "fisher" else []
    inputs = [file for name in names for file in sorted((folder / name).glob("*.safetensors"))]
    outputs = sorted((folder / "model1").glob("*.safetensors"))
    output.mkdir(exist_ok=True)
    buffer = memoryview(bytearray(1 << 24))

    def read(path: Path) -> None:
        mine = bytearray(1 << 24)
        with path.open("rb", buffering=0) as file:
            while file.readinto(mine):
                pass

    def write(path: Path) -> None:
        left = path.stat().st_size
        with (output / path.name).open("wb", buffering=0) as file:
            while left > 0:
                left -= file.write(buffer[: min(left, len(buffer))])

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, inputs))
        list(pool.map(write, outputs))
    seconds = time.perf_counter() - start
    shutil.rmtree(output)
    return seconds


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in a process of its own: the kernel counts this one's memory as that of those it starts."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def wrong_share(folder: Path, output: Path, method: str) -> float | None:
    """The share of one tensor's elements that are not the correctly rounded result; None for a random method."""
    import torch
    from safetensors import safe_open

    if method not in ("linear", "task_arithmetic"):
        return None
    name = "model.layers.0.mlp.down_proj.weight"

    def load(where: Path) -> torch.Tensor:
        index = where / "model.safetensors.index.json"
        held_by = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
        with safe_open(where / held_by, "pt") as file:
            return file.get_tensor(name)

    models = [load(folder / f"model{i}").double() for i in range(1, 4)]
    weight = MODEL_PARAMETERS[method]["weight"]
    if method == "linear":
        exact = sum(models) / 3
    else:
        base = load(folder / "base").double()
        exact = base + weight * sum(m - base for m in models)
    # to 8 significant bits, of two equally near the even one; torch's own conversion rounds to fp32 on the way
    bits = exact.view(torch.int64)
    nearest = (bits + (1 << 44) - 1 + (bits >> 45 & 1) >> 45 << 45).view(torch.float64)
    return float((load(output).double() != nearest).double().mean())


def measure(options: argparse.Namespace) -> list[dict]:
    work = options.folder / "work"
    work.mkdir(exist_ok=True)
    rows = []
    for method in options.methods:
        path = work / f"{method}.yaml"
        path.write_text(recipe(method, options.folder))
        rounds = []
        for number in range(options.rounds):
            figures = {"floor": {"wall": floor(options.folder, method, work / "floor")}}
            for who, command in programs(path, work, method, first=number == 0).items():
                figures[who] = run(command, work / f"{who}.log")
                if number == 0:
                    figures[who]["wrong"] = apart(wrong_share, options.folder, work / who, method)
                report = work / who / "merge_report.json"
                if report.exists():  # its memory counts all children, the kernel only the largest
                    own = json.loads(report.read_text())
                    peak = max(figures[who]["peak"], own["peak_memory"] / 1e6)
                    figures[who] |= {"engine": own["seconds"], "peak": peak}
                shutil.rmtree(work / who)
            rounds.append(figures)
        rows.append({"method": method, "rounds": rounds, **summary(rounds)})
    shutil.rmtree(work)
    return rows


def peaks(options: argparse.Namespace) -> list[dict]:
    """The peak memory of ours for models of several sizes."""
    work = options.folder / "work"
    work.mkdir(exist_ok=True)
    rows = []
    for folder in [options.folder, *options.memory]:
        row = {"bytes of a model": sum(file.stat().st_size for file in (folder / "model1").glob("*.safetensors"))}
        for method in options.methods:
            path = work / f"{method}.yaml"
            path.write_text(recipe(method, folder))
            shutil.rmtree(work / "ours", ignore_errors=True)
            command = programs(path, work, method)["ours"]
            peak = run(command, work / "ours.log")["peak"]
            own = json.loads((work / "ours" / "merge_report.json").read_text())
            row[method] = max(peak, own["peak_memory"] / 1e6)
        rows.append(row)
    shutil.rmtree(work)
    return sorted(rows, key=lambda row: row["bytes of a model"])


def memory_table(rows: list[dict]) -> str:
    names = [name for name in rows[0] if name != "bytes of a model"]
    head = f"| MB of a model | {' | '.join(f'{name}: peak MB' for name in names)} |\n|{'---|' * (len(names) + 1)}"
    lines = [
        f"| {row['bytes of a model'] / 1e6:.0f} | {' | '.join(f'{row[name]:.0f}' for name in names)} |" for row in rows
    ]
    return "\n".join([head, *lines])


def programs(path: Path, work: Path, method: str, *, first: bool = True) -> dict[str, list[str]]:
    """What runs in a round, each into the folder of its name."""
    ours = [sys.executable, "-m", "hf_modular.cli", "merge", str(path), "--seed", "0", "--quiet", "--no-verify"]
    found = {
        "ours": [*ours, str(work / "ours"), "--no-hashes"],
        "hashed": [*ours, str(work / "hashed"), "--hashes"],
    }
    if PEER.exists() and method not in OURS_ONLY and (first or method not in ONCE):
        found["mergekit"] = [str(PEER), str(path), str(work / "mergekit"), "--random-seed", "0", "--quiet"]
    return found


def summary(rounds: list[dict]) -> dict:
    def median(who: str, key: str) -> float | None:
        values = [r[who][key] for r in rounds if who in r and r[who].get(key) is not None]
        return statistics.median(values) if values else None

    def ratio(over: tuple[str, str], under: tuple[str, str]) -> float | None:
        values = [r[over[0]][over[1]] / r[under[0]][under[1]] for r in rounds if over[0] in r and under[0] in r]
        return statistics.median(values) if values else None

    figures = {
        f"{who}_{key}": median(who, key) for who in ("ours", "mergekit") for key in ("wall", "cpu", "peak", "wrong")
    }
    return figures | {
        "hashed_wall": median("hashed", "wall"),
        "hashed_cpu": median("hashed", "cpu"),
        "floor": median("floor", "wall"),
        "engine": median("ours", "engine"),
        "faster": ratio(("mergekit", "wall"), ("ours", "wall")),
        "engine_faster": ratio(("mergekit", "wall"), ("ours", "engine")),
        "engine_by_floor": ratio(("ours", "engine"), ("floor", "wall")),
    }


COLUMNS = {
    "ours_wall": "s",
    "ours_cpu": "CPU s",
    "engine": "engine s",
    "hashed_wall": "s with hashes",
    "hashed_cpu": "CPU s with hashes",
    "mergekit_wall": "mergekit s",
    "mergekit_cpu": "mergekit CPU s",
    "floor": "floor s",
    "faster": "times faster",
    "engine_faster": "engine times faster",
    "engine_by_floor": "engine / floor",
    "ours_peak": "MB",
    "mergekit_peak": "mergekit MB",
    "ours_wrong": "wrong",
    "mergekit_wrong": "mergekit wrong",
}


def table(rows: list[dict]) -> str:
    head = f"| method | {' | '.join(COLUMNS.values())} |\n|{'---|' * (len(COLUMNS) + 1)}"
    lines = [f"| {row['method']} | {' | '.join(cell(key, row.get(key)) for key in COLUMNS)} |" for row in rows]
    return "\n".join([head, *lines])


def cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if key.endswith("wrong") else f"{value:.0f}" if key.endswith("peak") else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--methods", type=lambda s: s.split(","), default=[name for name in PARAMETERS if name != "opcm"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument(
        "--memory", type=Path, nargs="+", help="Only peak memory, for the models in these folders too."
    )
    options = parser.parse_args()
    if options.memory:
        name, rows, shown = "merge-memory", peaks(options), memory_table
    else:
        name, shown = "merge", table
        rows = [*kept(options.output / "merge.json", options.methods), *measure(options)]
        rows.sort(key=lambda row: [*PARAMETERS].index(row["method"]))
    options.output.mkdir(exist_ok=True, parents=True)
    (options.output / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.output / f"{name}.md").write_text(shown(rows) + "\n")
    print(shown(rows))


def kept(path: Path, methods: list[str]) -> list[dict]:
    """The rows of earlier runs that are not measured anew."""
    rows = json.loads(path.read_text()) if path.exists() else []
    return [row for row in rows if row["method"] not in methods]


if __name__ == "__main__":
    main()

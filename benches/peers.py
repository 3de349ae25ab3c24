#!/usr/bin/env python3
"""Measures other implementations of this crate's operators and of Mamba on the CPU beside this one and prints a Markdown table.

    python3 benches/peers.py [--work DIR] [--rounds 3] [--seconds 6] [--only PEER,..] [--skip PEER,..] [--out FILE]

Installs the peers from PyPI and crates.io into DIR (default target/peers), writes one random model of the published
130m configuration there, and times every task `--rounds` times, the implementations one after another in each round,
so that a disturbed minute hits all of them. A peer that does not install is listed with the reason. `--build-with` and
`--time-with` name commands put before builds and timings (nice, taskset, a lock).

Needs Python 3.10 or newer, a C++ compiler for llama.cpp, and some 8 GB of disk (PyPI's torch brings the CUDA libraries).
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PYTHON = {
    "torch": ["torch==2.11.0", "transformers==5.23.0", "mambapy==1.2.0", "einops", "safetensors", "numpy"],
    # without what they depend on: they want other versions of it than they need
    "retention": ["--no-deps", "fla-core==0.6.0", "flash-linear-attention==0.6.0", "torchscale==0.3.0"],
    "llama.cpp": ["llama-cpp-python==0.3.36", "gguf==0.19.0"],
}
CRATES = {
    "mamba-rs": 'mamba-rs = { version = "=0.8.2", features = ["hf", "gemm-blas"] }',
    "candle-transformers": 'candle-core = "=0.11.1"\ncandle-nn = "=0.11.1"\ncandle-transformers = "=0.11.1"',
}
OURS = "subquadratic"
# task: title, unit, whether more is better, who takes part
TASKS = {
    "prefill-512": ("prefill 512", "tokens/s", ["mamba-rs", "llama.cpp", "transformers", "mambapy", "candle-transformers"]),
    "prefill-2048": ("prefill 2048", "tokens/s", ["mamba-rs", "llama.cpp", "transformers", "mambapy"]),
    "decode-f32": ("decode, f32", "tokens/s", ["mamba-rs", "llama.cpp", "transformers", "mambapy", "candle-transformers"]),
    "decode-bf16": ("decode, bf16 (llama.cpp: f16)", "tokens/s", ["llama.cpp", "transformers"]),
    "block-fwd": ("block 768, B2 L512, forward", "ms", ["mamba-rs", "transformers", "mambapy"]),
    "block-fwdbwd": ("block 768, B2 L512, forward + backward", "ms", ["mamba-rs", "transformers", "mambapy"]),
    "scan-fwd": ("scan B1 D1536 L2048 N16, forward", "ms", ["naive", "mambapy"]),
    "scan-fwdbwd": ("scan B1 D1536 L2048 N16, forward + backward", "ms", ["naive", "mambapy"]),
    "ret64-fwd": ("retention B1 T4096 H8 K64 V128, forward", "ms", ["fla", "torchscale"]),
    "ret64-fwdbwd": ("retention B1 T4096 H8 K64 V128, forward + backward", "ms", ["fla", "torchscale"]),
    "ret256-fwd": ("retention B1 T4096 H8 K256 V512, forward", "ms", ["fla", "torchscale"]),
    "ret256-fwdbwd": ("retention B1 T4096 H8 K256 V512, forward + backward", "ms", ["fla", "torchscale"]),
}
for length in ("1k", "4k", "16k", "128k"):
    for part, name in (("fwd", "forward"), ("fwdbwd", "forward + backward")):
        TASKS[f"conv_{length}-{part}"] = (f"long convolution, gated, B1 D256 L{length}, {name}", "ms", ["rfft"])
for name, sizes in (("8k", "L8192 S8"), ("8k_s2", "L8192 S2"), ("64k", "L65536 S8")):
    # the package would need 13 GB for the longest
    peers = ["rfft"] if name == "64k" else ["rfft", "package"]
    TASKS[f"modal_{name}-fwd"] = (f"modal convolution B1 D1024 {sizes}, forward", "ms", peers)
TITLES = {"naive": "torch time loop", "rfft": "torch rfft", "package": "torch, filter made too"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "target" / "peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of every single timing, about")
    parser.add_argument("--only", default="", help="these implementations")
    parser.add_argument("--skip", default="", help="not these")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--build-with", default="", type=shlex.split)
    parser.add_argument("--time-with", default="", type=shlex.split)
    parser.add_argument("--out", type=Path, help="write the table here as well")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    def wanted(peer):
        only, skip = filter(None, options.only.split(",")), options.skip.split(",")
        only = set(only)
        return peer not in skip and (not only or peer in only or peer == OURS)

    missing = {}
    commands = install(options, wanted, missing)
    tasks = {task: TASKS[task] for task in options.tasks.split(",")}
    results = {task: {} for task in tasks}
    for round_number in range(options.rounds):
        for task, (title, unit, peers) in tasks.items():
            for peer in [OURS, *filter(wanted, peers)]:
                if peer not in commands or (task, peer) in missing:
                    continue
                try:
                    outcome = commands[peer](task)
                except (subprocess.CalledProcessError, OSError, ValueError, KeyError, IndexError) as error:
                    missing[task, peer] = reason(error)
                    continue
                results[task].setdefault(peer, []).append(outcome)
                seconds = statistics.median(outcome["seconds"])
                print(f"{round_number} {task} {peer}: {seconds:.4g} s", file=sys.stderr, flush=True)
    table = report(options, tasks, results, missing)
    print(table)
    if options.out:
        options.out.write_text(table)


# Installing


def call(command, **settings):
    print("+", " ".join(map(str, command)), file=sys.stderr, flush=True)
    return subprocess.run(command, check=True, text=True, capture_output=True, **settings).stdout


def reason(error):
    text = getattr(error, "stderr", "") or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line] or lines or [type(error).__name__]
    return telling[-1][:200]


def install(options, wanted, missing):
    """What measures a task, by implementation."""
    work, build, model = options.work, options.build_with, options.work / "model"
    commands = {}
    venv = work / "venv"
    python = venv / "bin" / "python"
    if not python.exists():
        call([sys.executable, "-m", "venv", venv])

    def worker(*command):
        def run(task):
            arguments = [task, str(model), str(options.seconds)]
            return json.loads(call([*options.time_with, *map(str, command), *arguments]).splitlines()[-1])

        return run

    try:
        call([*build, python, "-m", "pip", "install", "-q", *PYTHON["torch"]])
        if not (model / "model.safetensors").exists():
            call([*build, python, HERE / "peers" / "torch_peers.py", "make", model])
        for peer in ("transformers", "mambapy", "naive", "rfft", "package"):
            commands[peer] = worker(python, HERE / "peers" / "torch_peers.py", peer)
    except (subprocess.CalledProcessError, OSError) as error:
        sys.exit(f"PyTorch and transformers make the model that all are measured on: {reason(error)}")
    if wanted("fla") or wanted("torchscale"):
        try:
            call([*build, python, "-m", "pip", "install", "-q", *PYTHON["retention"]])
            for peer in ("fla", "torchscale"):
                commands[peer] = worker(python, HERE / "peers" / "torch_peers.py", peer)
        except (subprocess.CalledProcessError, OSError) as error:
            missing["fla, torchscale"] = reason(error)
    if wanted("llama.cpp"):
        try:
            call([*build, python, "-m", "pip", "install", "-q", *PYTHON["llama.cpp"]])
            if not (model / "f16.gguf").exists():
                call([*build, python, HERE / "peers" / "llama.py", "make", model])
            commands["llama.cpp"] = worker(python, HERE / "peers" / "llama.py")
        except (subprocess.CalledProcessError, OSError) as error:
            missing["llama.cpp"] = reason(error)
    for peer, dependencies in CRATES.items():
        if wanted(peer):
            try:
                commands[peer] = worker(crate(work, build, peer, dependencies))
            except (subprocess.CalledProcessError, OSError) as error:
                missing[peer] = reason(error)
    for target in (["--example", "speed"], ["--bench", "subquadratic"]):
        try:
            call([*build, "cargo", "build", "--release", *target], cwd=ROOT)
        except subprocess.CalledProcessError as error:
            missing[f"{OURS} ({target[1]})"] = reason(error)
    commands[OURS] = lambda task: ours(options, model, task)
    return commands


def crate(work, build, peer, dependencies):
    """The program of a peer's source file, built as a package of its own for this machine's processor."""
    name = peer.replace("-", "_")
    package = work / name
    (package / "src").mkdir(parents=True, exist_ok=True)
    manifest = f'[package]\nname = "{name}_peer"\nedition = "2024"\n\n[workspace]\n\n[dependencies]\n{dependencies}\n'
    (package / "Cargo.toml").write_text(manifest)
    shutil.copy(HERE / "peers" / f"{name}.rs", package / "src" / "main.rs")
    environment = {**os.environ, "RUSTFLAGS": "-Ctarget-cpu=native", "CARGO_TARGET_DIR": str(package / "target")}
    # mamba-rs declares a newer Rust than it needs
    call([*build, "cargo", "build", "--release", "--ignore-rust-version"], cwd=package, env=environment)
    return package / "target" / "release" / f"{name}_peer"


# Measuring ours


def ours(options, model, task):
    kind, _, detail = task.partition("-")
    if kind in ("prefill", "decode"):
        prompt, tokens = (detail, "1") if kind == "prefill" else ("16", "64")
        command = ["target/release/examples/speed", "--model", model, "--prompt", prompt, "--tokens", tokens]
        if detail == "bf16":
            command += ["--dtype", "bf16"]
        result = json.loads(call([*options.time_with, *map(str, command)], cwd=ROOT).splitlines()[-1])
        rate = result["prefill_tok_s" if kind == "prefill" else "decode_tok_s"]
        return {"seconds": [1 / rate], "tokens": 1, "peak_bytes": result["peak_bytes"]}
    places = {
        "block": ("mamba", "cpu-130m-block"),
        "scan": ("selective_scan", "cpu-130m"),
        "ret64": ("retention", "cpu-k64"),
        "ret256": ("retention", "cpu-k256"),
    }
    short, _, size = kind.partition("_")
    operators = {"conv": "long_conv", "modal": "modal_conv"}
    group, shape = places.get(kind) or (operators[short], "cpu-" + size.replace("_", "-"))
    part = {"fwd": "fwd", "fwdbwd": "fwd_bwd"}[detail]
    home = options.work / "criterion"
    environment = {**os.environ, "CRITERION_HOME": str(home)}
    bench = ["cargo", "bench", "--bench", "subquadratic", "--", "--exact", f"{group}/{shape}/f32/{part}"]
    call([*options.time_with, *bench], cwd=ROOT, env=environment)
    sample = json.loads((home / group / f"{shape}_f32_{part}" / "new" / "sample.json").read_text())
    return {"seconds": [time / count / 1e9 for time, count in zip(sample["times"], sample["iters"])]}


# Reporting


def figures(unit, outcomes):
    """Every sample in the unit."""
    scale = {"ms": lambda seconds, _: seconds * 1e3, "tokens/s": lambda seconds, tokens: tokens / seconds}[unit]
    return [scale(seconds, run.get("tokens", 1)) for run in outcomes for seconds in run["seconds"]]


def spread(values):
    """The median, and the range of the middle half."""
    middle = statistics.median(values)
    if len(values) < 4:
        low, high = min(values), max(values)
    else:
        low, _, high = statistics.quantiles(values, n=4)
    return middle, f"{middle:.4g} ({low:.3g} to {high:.3g})"


def report(options, tasks, results, missing):
    columns = [OURS]
    for _, _, peers in tasks.values():
        columns += [peer for peer in peers if peer not in columns]
    columns = [peer for peer in columns if any(peer in results[task] for task in tasks)]
    lines = [
        f"{machine()}; {datetime.date.today()}; median (and middle half) of {options.rounds} rounds, all in one run.",
        "",
        "| | " + " | ".join(TITLES.get(peer, peer) for peer in columns) + " | ours to the best other |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for task, (title, unit, _) in tasks.items():
        cells, medians = [], {}
        for peer in columns:
            outcomes = results[task].get(peer)
            if outcomes:
                medians[peer], cell = spread(figures(unit, outcomes))
                cells.append(cell)
            else:
                cells.append("")
        others = [value for peer, value in medians.items() if peer != OURS]
        ratio = ""
        if OURS in medians and others:
            faster = medians[OURS] / max(others) if unit == "tokens/s" else min(others) / medians[OURS]
            ratio = f"{faster:.2f} x"
        lines.append(f"| {title}, {unit} | " + " | ".join(cells) + f" | {ratio} |")
    if "prefill-2048" in tasks:
        peak = lambda outcomes: f"{max(run['peak_bytes'] for run in outcomes) / 1e6:.0f}"
        cells = [peak(results["prefill-2048"][peer]) if peer in results["prefill-2048"] else "" for peer in columns]
        lines.append("| peak memory, prefill 2048, MB | " + " | ".join(cells) + " | |")
        tokens = {peer: runs[0]["token"] for peer, runs in results["prefill-2048"].items() if "token" in runs[0]}
        lines += ["", f"Greedy token after the 2048: {tokens}."]
    for key, why in missing.items():
        what = key if isinstance(key, str) else f"{key[1]}, {key[0]}"
        lines += ["", f"Not measured: {what}: {why}"]
    return "\n".join(lines) + "\n"


def machine():
    names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


if __name__ == "__main__":
    main()

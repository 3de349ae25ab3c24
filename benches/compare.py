#!/usr/bin/env python3
"""Time this crate's CUDA operators and their peers on one GPU, in one run, and print one Markdown table.

    cargo bench --features cuda --no-run            # prints the executable
    python3 benches/compare.py --bench EXECUTABLE --peers DIR [OPERATOR ..] [--shapes h96,d256] [--dtypes bf16,f32]

DIR holds the peers as published: mamba_ssm-*.tar.gz (its scan is compiled here, some three minutes) and the wheels of
fla-core and flash-linear-attention; PyTorch and Triton must be installed. Operators run through the crate's public
functions, calls in a row, forward and backward on its tape; peers through their kernels alone, which favours them. `bwd`
of the crate is the difference of the two: it contains what forward keeps for it. `models` are whole models of published
sizes, without a peer. Times are medians in milliseconds. Floors go by what this GPU did in the same run: bytes over the
rate of a copy (weights, for decoding), exponentials over its clock, products over the rate of a large one. Rows are printed
as soon as both have been timed; standard error has every single time before that.
"""
import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import gpu_peers
from gpu_peers import HERE, NORMS, SELECTED, cuda_shapes, shapes_of

OPERATORS = ["selective_scan", "selective_state_update", "causal_conv1d", *NORMS, "retention", "retention_step", "training",
             "models"]
BF16 = ["retention", "training", "models"]  # by default in bf16 alone
MODELS = {"mamba-130m": 768, "mamba-1.4b": 2048, "mamba-2.8b": 2560, "retnet-1.3b": 2048, "retnet-1.3b-h32": 2048}  # and their widths
VOCABULARY, PROMPT = 50280, 8192  # of the models; tokens of the prefill that is compared
UNITS = {"ns": 1e-6, "µs": 1e-3, "us": 1e-3, "ms": 1.0, "s": 1e3}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", required=True, help="the benchmark executable, built with the feature cuda")
    parser.add_argument("--peers", required=True, help="folder of the peers' packages")
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"of {', '.join(OPERATORS)}; all by default")
    parser.add_argument("--only", help="the same, separated by commas")
    parser.add_argument("--shapes", help="names from shapes.json, separated by commas; all by default")
    parser.add_argument("--dtypes", help="by default bf16 and f32; for retention, whose peer compiles for minutes, and training bf16")
    options = parser.parse_args()
    operators = options.operators or (options.only.split(",") if options.only else OPERATORS)
    SELECTED.extend(options.shapes.split(",") if options.shapes else [])
    dtypes_of = lambda operator: (
        options.dtypes.split(",") if options.dtypes else ["bf16"] if operator in BF16 else ["bf16", "f32"])
    rates = gpu_peers.Rates()
    print(rates, end="\n\n")
    print("| operator | shape | dtype | pass | this crate | peer | peer / this | floor | floor / this |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for operator in operators:
        dtypes = dtypes_of(operator)
        ours = time_ours(options.bench, operator, dtypes)
        left = list(ours)
        try:
            for peers in gpu_peers.time(operator, options.peers, dtypes) if operator != "models" else []:
                timed = {key[:3] for key in peers}
                print_rows([key for key in left if key[:3] in timed], ours, peers, rates)
                left = [key for key in left if key[:3] not in timed]
        except Exception as error:  # one peer's failure must not hide the other figures
            print(f"{operator}: the peer failed: {type(error).__name__} {error}"[:600], file=sys.stderr)
        print_rows(left, ours, {}, rates)


def print_rows(keys, ours, peers, rates):
    for key in keys:
        (operator, shape, dtype, what), own, peer = key, ours[key][0], peers.get(key)
        if operator in MODELS:
            floor = floor_of_model(ours, operator, shape, dtype, rates)
        else:
            floor = floor_of(operator, shape, dtype, what, rates)
        cells = [operator, shape, dtype, what, f"{own:.4f}"]
        cells += [f"{peer:.4f}", f"{peer / own:.2f}"] if peer else ["", ""]
        cells += [f"{floor:.4f}", f"{floor / own:.0%}"] if floor else ["", ""]
        print("| " + " | ".join(cells) + " |", flush=True)


def time_ours(bench, operator, dtypes):
    """By (operator, shape, dtype, pass): the median of the benchmark executable, ms, and the bytes of a call where it says
    them; of models by (model, what, dtype, pass)."""
    names = "|".join(re.escape(shape["name"]) for shape in cuda_shapes(operator)) if operator != "models" else ""
    only = f"^{operator}/({names})/({'|'.join(dtypes)})/"
    if operator == "models":
        chosen = [name for name in MODELS if not SELECTED or name in SELECTED]
        only = f"^({'|'.join(map(re.escape, chosen))})/(decode|prefill-{PROMPT})/({'|'.join(dtypes)})/"
    arguments = [bench, "--bench", "--quick", "--noplot", "--color", "never", only]
    times, key = {}, None
    running = subprocess.Popen(arguments, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    for line in running.stdout:
        name = re.match(r"^([^/\s]+)/([^/\s]+)/(\w+)/(\w+)", line)
        key = name.groups() if name else key
        time = re.search(r"time:\s+\[[\d.]+ \S+ ([\d.]+) (\S+) ", line)
        if time and key:
            times[key] = float(time[1]) * UNITS[time[2]], None
            print(f"{'/'.join(key)}: {times[key][0]:.4f} ms", file=sys.stderr, flush=True)
        rate = re.search(r"thrpt:\s+\[[\d.]+ \S+ ([\d.]+) ([MGT])B/s ", line)
        if rate and key in times:
            own = times[key][0]
            times[key] = own, own * 1e-3 * float(rate[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[rate[2]]
    if running.wait():  # what was measured before still counts
        print(f"{operator}: the benchmarks failed, see above", file=sys.stderr)
    for key in [key for key in times if key[3] == "fwd_bwd"]:
        times[key[:3] + ("bwd",)] = times[key][0] - times[key[:3] + ("fwd",)][0], None
    return times


def floor_of(operator, name, dtype, what, rates):
    """The least time, ms: bytes over the copy bandwidth, or for the scan its exponentials."""
    shape = next(shape for shape in shapes_of(operator) if shape["name"] == name)
    size = 4 if dtype == "f32" else 2
    if what not in ("fwd", "step", "graph") or operator == "training":
        return None
    if operator in NORMS:
        return rates.copy(NORMS[operator] * shape["B"] * shape["L"] * shape["D"] * size)
    if operator.startswith("retention"):
        b, t, h, k, v = shape["B"], shape.get("T", 1), shape["H"], shape["K"], shape["V"]
        sequences, states = 2 * b * t * h * (k + v) * size, 8 * b * h * k * v if what != "fwd" else 0
        return rates.copy(sequences + states)
    b, d, n = shape["B"], shape["D"], shape.get("N", 0)
    if what != "fwd":
        return rates.copy(8 * b * d * n + 4 * size * b * d)
    tokens = b * shape["L"]
    tensors = 4 if operator == "selective_scan" else 2
    return max(rates.copy(tensors * tokens * d * size + 2 * tokens * n * size), rates.exponentials(tokens * d * n))


def floor_of_model(ours, model, what, dtype, rates):
    """Of a token decoded, the time to read the weights, ms; of a prompt, that of its products with them."""
    weights = ours.get((model, "decode", dtype, "step"), (None, None))[1]
    if weights is None:
        return None
    if what == "decode":
        return rates.copy(weights)
    return rates.products(PROMPT * (weights / 2 - VOCABULARY * MODELS[model]))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Time this crate's CUDA operators and their peers on one GPU, in one run, and print one Markdown table.

    cargo bench --features cuda --no-run            # prints the executable
    python3 benches/compare.py --bench EXECUTABLE --peers DIR [--only selective_scan,..] [--dtypes bf16,f32]

DIR holds the peers as published: mamba_ssm-*.tar.gz (its scan is compiled here, some three minutes) and the wheels of
fla-core and flash-linear-attention; PyTorch and Triton must be installed. Operators run through the crate's public
functions and candle's graph, calls in a row; peers through their kernels alone, which favours them.
`bwd` and `fwd_bwd` of the crate include what candle does with gradients beside the operator, which `accumulate` measures
alone: a zero and a sum for every input, and the ones that go in. Times are medians in milliseconds.
"""
import argparse
import glob
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHAPES = json.loads((HERE / "shapes.json").read_text())
NORMS = {"rms_norm": 2, "layer_norm": 2, "add_norm": 4, "gated_norm": 3}  # tensors that each reads and writes
OPERATORS = ["selective_scan", "selective_state_update", "causal_conv1d", *NORMS, "retention", "retention_step"]
COPY_TB_S, MUFU_PER_S = 3.02, 132 * 16 * 1.98e9  # of one H100 (measured; multiprocessors x 16 a clock x clock)
UNITS = {"ns": 1e-6, "µs": 1e-3, "us": 1e-3, "ms": 1.0, "s": 1e3}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", required=True, help="the benchmark executable, built with the feature cuda")
    parser.add_argument("--peers", required=True, help="folder of the peers' packages")
    parser.add_argument("--only", default=",".join(OPERATORS))
    parser.add_argument("--dtypes", default="bf16,f32")
    options = parser.parse_args()
    operators, dtypes = options.only.split(","), options.dtypes.split(",")
    peers = {}
    for operator in operators:
        try:
            time = globals()["time_norm" if operator in NORMS else "time_" + operator]
            peers |= time(options.peers, dtypes, *[operator] * (operator in NORMS))
        except Exception as error:  # one peer's failure must not hide the other figures
            print(f"{operator}: the peer failed: {type(error).__name__} {error}"[:600], file=sys.stderr)
    ours = {key: value for operator in operators for key, value in time_ours(options.bench, operator, dtypes).items()}
    print("| operator | shape | dtype | pass | this crate | peer | peer / this | floor | floor / this |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (operator, shape, dtype, what), own in ours.items():
        if dtype not in dtypes:
            continue
        peer = peers.get((operator, shape, dtype, what))
        floor = floors(operator, shape, dtype, what)
        cells = [operator, shape, dtype, what, f"{own:.4f}", f"{peer:.4f}" if peer else "", f"{peer / own:.2f}" if peer else ""]
        cells += [f"{floor:.4f}", f"{floor / own:.0%}"] if floor else ["", ""]
        print("| " + " | ".join(cells) + " |")


def time_ours(bench, operator, dtypes):
    """Medians of the benchmark executable, ms."""
    shapes = "|".join(re.escape(shape["name"]) for shape in cuda_shapes(operator))
    only = f"^{operator}/({shapes})/({'|'.join(dtypes)})/"
    arguments = [bench, "--bench", "--quick", "--noplot", "--color", "never", only]
    text = subprocess.run(arguments, cwd=HERE.parent, capture_output=True, text=True, check=True).stdout
    times, key = {}, None
    for line in text.splitlines():
        name = re.match(rf"^({operator})/([^/\s]+)/(\w+)/(\w+)", line)
        key = name.groups() if name else key
        time = re.search(r"time:\s+\[[\d.]+ \S+ ([\d.]+) (\S+) ", line)
        if time and key:
            times[key] = float(time[1]) * UNITS[time[2]]
            key = None
    return times


def floors(operator, name, dtype, what):
    """The least time, ms: bytes over the copy bandwidth, or for the scan its exponentials."""
    shape = next(shape for shape in shapes_of(operator) if shape["name"] == name)
    size = 4 if dtype == "f32" else 2
    if what not in ("fwd", "step"):
        return None
    if operator in NORMS:
        return NORMS[operator] * shape["B"] * shape["L"] * shape["D"] * size / COPY_TB_S / 1e9
    if operator.startswith("retention"):
        b, t, h, k, v = shape["B"], shape.get("T", 1), shape["H"], shape["K"], shape["V"]
        sequences, states = 2 * b * t * h * (k + v) * size, 8 * b * h * k * v if what == "step" else 0
        return (sequences + states) / COPY_TB_S / 1e9
    b, d, n = shape["B"], shape["D"], shape.get("N", 0)
    if what == "step":
        return (8 * b * d * n + 4 * size * b * d) / COPY_TB_S / 1e9
    tokens = b * shape["L"]
    tensors = 4 if operator == "selective_scan" else 2
    bytes_moved = tensors * tokens * d * size + 2 * tokens * n * size
    return max(bytes_moved / COPY_TB_S / 1e9, tokens * d * n / MUFU_PER_S * 1e3)


def median(run):
    from triton.testing import do_bench
    return do_bench(run, warmup=50, rep=200, return_mode="median")


def dtype_of(name):
    import torch
    return {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[name]


def randn(*shape, dtype=None):
    import torch
    return torch.randn(*shape, device="cuda", dtype=dtype or torch.float32)


def shapes_of(operator):
    return SHAPES["norm" if operator in NORMS else operator]


def cuda_shapes(operator):
    return [shape for shape in shapes_of(operator) if not shape["name"].startswith("cpu-")]


def unpacked(peers):
    root = os.path.join(tempfile.gettempdir(), "subquadratic_peers")
    if not os.path.isdir(root):
        with tarfile.open(glob.glob(f"{peers}/mamba_ssm-*.tar.gz")[0]) as archive:
            archive.extractall(root, filter="data")
    return glob.glob(f"{root}/mamba_ssm-*")[0]


def scan_extension(peers):
    """mamba_ssm's scan, compiled unless it has been."""
    from torch.utils.cpp_extension import load
    source = unpacked(peers) + "/csrc/selective_scan"
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math"]
    kinds = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS", "BFLOAT162_OPERATORS",
             "BFLOAT162_CONVERSIONS")
    flags += [f"-U__CUDA_NO_{kind}__" for kind in kinds]
    build = os.path.join(tempfile.gettempdir(), "subquadratic_peers_build")
    os.makedirs(build, exist_ok=True)
    files = sorted(glob.glob(source + "/*.cpp") + glob.glob(source + "/*.cu"))
    return load("selective_scan_cuda", files, extra_include_paths=[source], extra_cflags=["-O3", "-std=c++17"],
                extra_cuda_cflags=flags, build_directory=build)


def time_selective_scan(peers, dtypes):
    import torch
    extension = scan_extension(peers)
    times = {}
    for shape in cuda_shapes("selective_scan"):
        b, d, l, n = (shape[letter] for letter in "BDLN")
        for name in dtypes:
            dtype = dtype_of(name)
            u, z, dout = (randn(b, d, l, dtype=dtype) for _ in range(3))
            delta = (0.5 * torch.rand(b, d, l, device="cuda")).to(dtype)
            a = -torch.rand(d, n, device="cuda") - 0.5
            bc = [randn(b, 1, n, l, dtype=dtype) for _ in range(2)]
            skip, bias = randn(d), 0.5 * torch.rand(d, device="cuda")
            forward = lambda: extension.fwd(u, delta, a, *bc, skip, z, bias, True)
            out, x, *_ = forward()
            backward = lambda: extension.bwd(u, delta, a, *bc, skip, z, bias, dout, x, out, None, True, False)
            key = ("selective_scan", shape["name"], name)
            times[key + ("fwd",)] = median(forward)
            times[key + ("bwd",)] = median(backward)
            times[key + ("fwd_bwd",)] = times[key + ("fwd",)] + times[key + ("bwd",)]
            del u, z, dout, delta, bc, out, x
    return times


def use_mamba_ssm(peers):
    package = types.ModuleType("mamba_ssm")  # without its __init__, which needs the compiled extension
    package.__path__ = [unpacked(peers) + "/mamba_ssm"]
    sys.modules.setdefault("mamba_ssm", package)


def time_norm(peers, dtypes, operator):
    import torch
    use_mamba_ssm(peers)
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    runs = {
        "rms_norm": lambda x, other, weight, bias: rms_norm_fn(x, weight, None, eps=1e-5),
        "layer_norm": lambda x, other, weight, bias: layer_norm_fn(x, weight, bias, eps=1e-5),
        "add_norm": lambda x, other, weight, bias: rms_norm_fn(x, weight, None, residual=other, prenorm=True, eps=1e-5)[0],
        "gated_norm": lambda x, other, weight, bias: rmsnorm_fn(x, weight, None, z=other, eps=1e-5, norm_before_gate=False),
    }
    times = {}
    for shape in cuda_shapes(operator):
        b, l, d = (shape[letter] for letter in "BLD")
        for name in dtypes:
            dtype = dtype_of(name)
            inputs = [randn(b, l, d, dtype=dtype), randn(b, l, d, dtype=dtype), randn(d, dtype=dtype), randn(d, dtype=dtype)]
            run = lambda: runs[operator](*inputs)
            key = (operator, shape["name"], name)
            with torch.no_grad():
                times[key + ("fwd",)] = median(run)
            for x in inputs:
                x.requires_grad_(True)
            gradient = torch.randn_like(run())
            times[key + ("fwd_bwd",)] = median(lambda: run().backward(gradient))
    return times


def time_selective_state_update(peers, dtypes):
    use_mamba_ssm(peers)
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    times = {}
    for shape in cuda_shapes("selective_state_update"):
        b, d, n = (shape[letter] for letter in "BDN")
        for name in dtypes:
            dtype = dtype_of(name)
            x, dt, z = (randn(b, d, dtype=dtype) for _ in range(3))
            bc = [randn(b, n, dtype=dtype) for _ in range(2)]
            state, a, skip, bias = randn(b, d, n), -torch.rand(d, n, device="cuda"), randn(d), randn(d)
            run = lambda: selective_state_update(state, x, dt, a, *bc, skip, z=z, dt_bias=bias, dt_softplus=True)
            times["selective_state_update", shape["name"], name, "step"] = median(run)
    return times


def use_fla(peers):
    site = os.path.join(tempfile.gettempdir(), "subquadratic_peers_site")
    if not os.path.isdir(site):
        wheels = glob.glob(f"{peers}/*.whl")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site]
        subprocess.run(pip + wheels, check=True)
    if site not in sys.path:
        sys.path.insert(0, site)


def time_retention(peers, dtypes):
    import torch
    use_fla(peers)
    from fla.ops.retention import chunk_retention
    times = {}
    for shape in cuda_shapes("retention"):
        b, t, h, k, v = (shape[letter] for letter in "BTHKV")
        for name in dtypes:
            dtype = dtype_of(name)
            inputs = [randn(b, t, h, width, dtype=dtype) for width in (k, k, v)]
            run = lambda: chunk_retention(*inputs)[0]
            key = ("retention", shape["name"], name)
            with torch.no_grad():
                times[key + ("fwd",)] = median(run)
            for x in inputs:
                x.requires_grad_(True)
            gradient = torch.randn_like(run())
            times[key + ("fwd_bwd",)] = median(lambda: run().backward(gradient))
    return times


def time_retention_step(peers, dtypes):
    import torch
    use_fla(peers)
    from fla.ops.retention import fused_recurrent_retention
    times = {}
    for shape in cuda_shapes("retention_step"):
        b, h, k, v = (shape[letter] for letter in "BHKV")
        for name in dtypes:
            inputs = [randn(b, 1, h, width, dtype=dtype_of(name)) for width in (k, k, v)]
            state = randn(b, h, k, v)
            run = lambda: fused_recurrent_retention(*inputs, initial_state=state, output_final_state=True)
            with torch.no_grad():
                times["retention_step", shape["name"], name, "step"] = median(run)
    return times


def time_causal_conv1d(peers, dtypes):
    import torch
    use_fla(peers)
    from fla.modules.conv.causal_conv1d import causal_conv1d
    times = {}
    for shape in cuda_shapes("causal_conv1d"):
        b, d, l, k = (shape[letter] for letter in "BDLK")
        for name in dtypes:
            dtype = dtype_of(name)
            inputs = [randn(b, l, d, dtype=dtype), randn(d, k, dtype=dtype), randn(d, dtype=dtype)]
            run = lambda: causal_conv1d(*inputs, activation="silu")[0]
            key = ("causal_conv1d", shape["name"], name)
            with torch.no_grad():
                times[key + ("fwd",)] = median(run)
            for x in inputs:
                x.requires_grad_(True)
            gradient = torch.randn_like(run())
            times[key + ("fwd_bwd",)] = median(lambda: run().backward(gradient))
    return times


if __name__ == "__main__":
    main()

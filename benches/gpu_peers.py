"""Build and time other implementations of the operators on a GPU; compare.py puts them beside this crate's."""
import glob
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHAPES = json.loads((HERE / "shapes.json").read_text())
NORMS = {"rms_norm": 2, "layer_norm": 2, "add_norm": 4, "gated_norm": 3}  # tensors that each reads and writes
SELECTED = []  # names of shapes; all if empty


def time(operator, peers, dtypes):
    """Milliseconds by (operator, shape, dtype, pass), a shape and dtype at a time; `peers` is the folder of the packages."""
    if operator in NORMS:
        return time_norm(peers, dtypes, operator)
    return globals()["time_" + operator](peers, dtypes)


def shapes_of(operator):
    return SHAPES["norm" if operator in NORMS else operator]


def cuda_shapes(operator):
    named = [shape for shape in shapes_of(operator) if not shape["name"].startswith("cpu-")]
    return [shape for shape in named if not SELECTED or shape["name"] in SELECTED]


def median(run, depth=1):
    """Milliseconds; also to standard error, so that what a time limit cuts off is not lost."""
    from triton.testing import do_bench
    time = do_bench(run, warmup=25, rep=100, return_mode="median")
    print(f"{sys._getframe(depth).f_code.co_name}: {time:.4f} ms", file=sys.stderr, flush=True)
    return time


def step_and_graph(key, run):
    """A call, and one of many recorded as a CUDA graph."""
    import torch
    with torch.no_grad():
        times = {key + ("step",): median(run, 2)}
        graph, each = torch.cuda.CUDAGraph(), 20
        with torch.cuda.graph(graph):
            for _ in range(each):
                run()
        return times | {key + ("graph",): median(graph.replay, 2) / each}


def forward_and_backward(key, run, inputs):
    """Both passes of `run`, and forward alone."""
    import torch
    with torch.no_grad():
        forward = median(run, 2)
    for x in inputs:
        x.requires_grad_(True)
    gradient = torch.randn_like(run())
    return {key + ("fwd",): forward, key + ("fwd_bwd",): median(lambda: run().backward(gradient), 2)}


class Rates:
    """What this GPU does: bytes copied (read and written), bf16 products of 8192 x 8192 matrices, exponentials."""

    def __init__(self):
        import torch
        device = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
        clock = float(subprocess.run(query, capture_output=True, text=True, check=True).stdout) * 1e6
        source = randn(1 << 30, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        left, right = (randn(8192, 8192, dtype=torch.bfloat16) for _ in range(2))
        self.name = device.name
        self.bytes_per_ms = 4 * source.numel() / median(lambda: target.copy_(source))
        self.operations_per_ms = 2 * 8192**3 / median(lambda: left @ right)
        self.exponentials_per_ms = device.multi_processor_count * 16 * clock * 1e-3

    def __str__(self):
        return (f"{self.name}: copy {self.bytes_per_ms * 1e-9:.2f} TB/s, bf16 product "
                f"{self.operations_per_ms * 1e-9:.0f} TFLOP/s, {self.exponentials_per_ms * 1e-9:.2f} T exponentials/s")

    def copy(self, size):
        return size / self.bytes_per_ms

    def products(self, multiplications):
        return 2 * multiplications / self.operations_per_ms

    def exponentials(self, count):
        return count / self.exponentials_per_ms


def dtype_of(name):
    import torch
    return {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[name]


def randn(*shape, dtype=None):
    import torch
    return torch.randn(*shape, device="cuda", dtype=dtype or torch.float32)


def unpacked(peers, package):
    """The folder of a source package."""
    root = Path(tempfile.gettempdir()) / "subquadratic_peers"
    if not list(root.glob(f"{package}-*")):
        with tarfile.open(glob.glob(f"{peers}/{package}-*.tar.gz")[0]) as archive:
            archive.extractall(root, filter="data")
    return next(root.glob(f"{package}-*"))


def extension(name, source):
    """A package's CUDA extension: an installed one, or from the files in `source`, compiled unless it has been."""
    if importlib.util.find_spec(name):
        return importlib.import_module(name)
    from torch.utils.cpp_extension import load
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math"]
    kinds = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS", "BFLOAT162_OPERATORS",
             "BFLOAT162_CONVERSIONS")
    flags += [f"-U__CUDA_NO_{kind}__" for kind in kinds]
    build = Path(tempfile.gettempdir()) / "subquadratic_peers_build" / name
    build.mkdir(parents=True, exist_ok=True)
    files = sorted(str(file) for file in [*source.glob("*.cpp"), *source.glob("*.cu")])
    return load(name, files, extra_include_paths=[str(source)], extra_cflags=["-O3", "-std=c++17"],
                extra_cuda_cflags=flags, build_directory=str(build))


def scan_extension(peers):
    """mamba_ssm's scan, without complex weights, which nothing here has and which take half of the compilation."""
    source = unpacked(peers, "mamba_ssm") / "csrc/selective_scan"
    for file in source.glob("*complex.cu"):
        file.unlink()
    for file in source.glob("*.cu"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if "complex_t>(" not in line))
    host = source / "selective_scan.cpp"
    host.write_text(host.read_text().replace("using weight_t = c10::complex<float>;", "using weight_t = float;"))
    return extension("selective_scan_cuda", source)


def convolution_extension(peers):
    return extension("causal_conv1d_cuda", unpacked(peers, "causal_conv1d") / "csrc")


def time_selective_scan(peers, dtypes):
    import torch
    extension = scan_extension(peers)
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
            times = median(forward), median(backward)
            yield {key + ("fwd",): times[0], key + ("bwd",): times[1], key + ("fwd_bwd",): sum(times)}
            del u, z, dout, delta, bc, out, x


def use_mamba_ssm(peers):
    package = types.ModuleType("mamba_ssm")  # without its __init__, which needs the compiled extension
    package.__path__ = [str(unpacked(peers, "mamba_ssm") / "mamba_ssm")]
    sys.modules.setdefault("mamba_ssm", package)


def time_norm(peers, dtypes, operator):
    use_mamba_ssm(peers)
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    runs = {
        "rms_norm": lambda x, other, weight, bias: rms_norm_fn(x, weight, None, eps=1e-5),
        "layer_norm": lambda x, other, weight, bias: layer_norm_fn(x, weight, bias, eps=1e-5),
        "add_norm": lambda x, other, weight, bias: rms_norm_fn(x, weight, None, residual=other, prenorm=True, eps=1e-5)[0],
        "gated_norm": lambda x, other, weight, bias: rmsnorm_fn(x, weight, None, z=other, eps=1e-5, norm_before_gate=False),
    }
    for shape in cuda_shapes(operator):
        b, l, d = (shape[letter] for letter in "BLD")
        for name in dtypes:
            dtype = dtype_of(name)
            inputs = [randn(b, l, d, dtype=dtype), randn(b, l, d, dtype=dtype), randn(d, dtype=dtype), randn(d, dtype=dtype)]
            run = lambda: runs[operator](*inputs)
            yield forward_and_backward((operator, shape["name"], name), run, inputs)


def time_selective_state_update(peers, dtypes):
    import torch
    use_mamba_ssm(peers)
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    for shape in cuda_shapes("selective_state_update"):
        b, d, n = (shape[letter] for letter in "BDN")
        for name in dtypes:
            dtype = dtype_of(name)
            x, dt, z = (randn(b, d, dtype=dtype) for _ in range(3))
            bc = [randn(b, n, dtype=dtype) for _ in range(2)]
            state, a, skip, bias = randn(b, d, n), -torch.rand(d, n, device="cuda"), randn(d), randn(d)
            run = lambda: selective_state_update(state, x, dt, a, *bc, skip, z=z, dt_bias=bias, dt_softplus=True)
            yield step_and_graph(("selective_state_update", shape["name"], name), run)


def use_fla(peers):
    site = os.path.join(tempfile.gettempdir(), "subquadratic_peers_site")
    if not os.path.isdir(site):
        wheels = glob.glob(f"{peers}/*.whl")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site]
        subprocess.run(pip + wheels, check=True)
    if site not in sys.path:
        sys.path.insert(0, site)
        # where there is a mamba_ssm fla imports parts of it, which time_training would find made without causal_conv1d
        own, sys.modules["mamba_ssm"] = sys.modules.get("mamba_ssm"), None
        import fla  # noqa: F401
        del sys.modules["mamba_ssm"]
        if own:
            sys.modules["mamba_ssm"] = own


def time_retention(peers, dtypes):
    use_fla(peers)
    from fla.ops.retention import chunk_retention
    for shape in cuda_shapes("retention"):
        b, t, h, k, v = (shape[letter] for letter in "BTHKV")
        for name in dtypes:
            dtype = dtype_of(name)
            inputs = [randn(b, t, h, width, dtype=dtype) for width in (k, k, v)]
            run = lambda: chunk_retention(*inputs)[0]
            yield forward_and_backward(("retention", shape["name"], name), run, inputs)


def time_retention_step(peers, dtypes):
    import torch
    use_fla(peers)
    from fla.ops.retention import fused_recurrent_retention
    for shape in cuda_shapes("retention_step"):
        b, h, k, v = (shape[letter] for letter in "BHKV")
        for name in dtypes:
            inputs = [randn(b, 1, h, width, dtype=dtype_of(name)) for width in (k, k, v)]
            state = randn(b, h, k, v)
            run = lambda: fused_recurrent_retention(*inputs, initial_state=state, output_final_state=True)
            yield step_and_graph(("retention_step", shape["name"], name), run)


def time_causal_conv1d(peers, dtypes):
    use_fla(peers)
    from fla.modules.conv.causal_conv1d import causal_conv1d
    for shape in cuda_shapes("causal_conv1d"):
        b, d, l, k = (shape[letter] for letter in "BDLK")
        for name in dtypes:
            dtype = dtype_of(name)
            inputs = [randn(b, l, d, dtype=dtype), randn(d, k, dtype=dtype), randn(d, dtype=dtype)]
            run = lambda: causal_conv1d(*inputs, activation="silu")[0]
            yield forward_and_backward(("causal_conv1d", shape["name"], name), run, inputs)


def time_training(peers, dtypes):
    """A step of training of mamba_ssm's blocks in PyTorch: its fused inner function with causal_conv1d, its fused sum and
    norm, cross-entropy, clipping, PyTorch's fused AdamW; weights and moments in the dtype, no masters."""
    import torch
    from functools import partial
    with ThreadPoolExecutor(2) as pool:  # compiled side by side
        list(pool.map(lambda build: build(peers), [scan_extension, convolution_extension]))
    use_fla(peers)  # einops is among its wheels
    use_mamba_ssm(peers)
    sys.path.insert(0, str(unpacked(peers, "causal_conv1d")))
    from mamba_ssm.modules.block import Block
    from mamba_ssm.modules.mamba_simple import Mamba
    from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn
    for shape in cuda_shapes("training"):
        b, l, d, count, vocabulary = (shape[letter] for letter in ["B", "L", "D", "layers", "V"])
        for name in dtypes:
            torch.manual_seed(0)
            dtype, mlp = dtype_of(name), torch.nn.Identity
            norm = partial(RMSNorm, device="cuda")
            make = lambda: Block(d, partial(Mamba, device="cuda", dtype=dtype), mlp, norm, True, False)
            blocks = torch.nn.ModuleList(make() for _ in range(count)).to(dtype)
            for block in blocks:
                block.mixer.A_log.data, block.mixer.D.data = block.mixer.A_log.data.float(), block.mixer.D.data.float()
            last = norm(d).to(dtype)
            embedding = torch.nn.Embedding(vocabulary, d, device="cuda", dtype=dtype)
            torch.nn.init.normal_(embedding.weight, std=0.02)
            parameters = [*blocks.parameters(), *last.parameters(), *embedding.parameters()]
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
            ids = torch.randint(vocabulary, (b, l + 1), device="cuda")

            def step():
                hidden, residual = embedding(ids[:, :-1]), None
                for block in blocks:
                    hidden, residual = block(hidden, residual)
                hidden = layer_norm_fn(hidden, last.weight, None, residual=residual, eps=1e-5, is_rms_norm=True)
                logits = torch.nn.functional.linear(hidden, embedding.weight).view(-1, vocabulary)
                loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()

            step()
            torch.cuda.reset_peak_memory_stats()
            yield {("training", shape["name"], name, "step"): median(step)}
            print(f"training: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB", file=sys.stderr)

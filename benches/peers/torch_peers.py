"""The PyTorch peers: transformers, mambapy, a selective scan as a plain loop over time, retention of fla and torchscale,
a long convolution by rfft, modal filters by FFT.

usage: torch_peers.py PEER TASK MODEL_DIR SECONDS      (peers.py calls this; the last line printed is JSON)
       torch_peers.py make MODEL_DIR                   (writes the random model all peers load)
"""

import json
import resource
import sys
import time

import torch
import torch.nn.functional as F

VOCABULARY, WIDTH, LAYERS, STATES = 50280, 768, 24, 16


def token_ids(count):
    return [(i * 7919 + 13) % 50257 for i in range(count)]


def repeat(run, seconds):
    """Wall times of `run`: one warm-up, then as many as fit; a run that outlasts the budget counts by itself."""
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return times[1:] or times


def make(directory):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=STATES,
                         tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = MambaForCausalLM(config)
    # as published, larger: logits far enough apart that the peers' greedy tokens can be compared
    with torch.no_grad():
        model.backbone.embeddings.weight.normal_(0, 0.02)
    model.save_pretrained(directory)


class Transformers:
    def __init__(self, directory, dtype):
        from transformers import MambaForCausalLM

        self.model = MambaForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    def prefill(self, ids):
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.cache_params

    def step(self, token, cache):
        out = self.model(token[:, None], use_cache=True, cache_params=cache, logits_to_keep=1)
        return out.logits[:, -1], out.cache_params

    @staticmethod
    def block():
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        return MambaMixer(MambaConfig(hidden_size=WIDTH, state_size=STATES), layer_idx=0)


class Mambapy:
    def __init__(self, directory, dtype):
        from mambapy.lm import LM
        from mambapy.mamba import MambaConfig
        from safetensors.torch import load_file

        self.model = LM(MambaConfig(d_model=WIDTH, n_layers=LAYERS, d_state=STATES), VOCABULARY).to(dtype).eval()
        names = (("backbone.embeddings", "embedding"), ("backbone.norm_f", "norm_f"), ("backbone.", "mamba."))
        state = {}
        for name, tensor in load_file(f"{directory}/model.safetensors").items():
            for theirs, ours in names:
                if name.startswith(theirs):
                    name = ours + name[len(theirs):]
                    break
            state[name] = tensor
        state.setdefault("lm_head.weight", state["embedding.weight"])
        self.model.load_state_dict(state)

    def prefill(self, ids):
        # its interface has no call that reads a prompt at once and keeps the state
        hidden = self.model.norm_f(self.model.mamba(self.model.embedding(ids))[:, -1])
        return self.model.lm_head(hidden), None

    def step(self, token, caches):
        config = self.model.config
        if caches is None:
            caches = [(None, torch.zeros(1, config.d_inner, config.d_conv - 1)) for _ in range(LAYERS)]
        return self.model.step(token, caches)

    @staticmethod
    def block():
        from mambapy.mamba import MambaBlock, MambaConfig

        return MambaBlock(MambaConfig(d_model=WIDTH, n_layers=1, d_state=STATES))


def naive_scan(u, delta, a, b, c, d, z, bias):
    delta = F.softplus(delta + bias)
    h, y = u.new_zeros(u.shape[0], u.shape[2], a.shape[1]), []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * a) * h + step * b[:, t, None] * u[:, t, :, None]
        y.append(torch.einsum("bdn,bn->bd", h, c[:, t]))
    return (torch.stack(y, 1) + u * d) * F.silu(z)


def mambapy_scan(u, delta, a, b, c, d, z, bias):
    from mambapy.pscan import pscan

    delta = F.softplus(delta + bias)
    h = pscan(torch.exp(delta[..., None] * a), (delta * u)[..., None] * b[:, :, None])
    return ((h @ c[..., None]).squeeze(3) + u * d) * F.silu(z)


def scan_inputs():
    (batch, length, channels), states = (1, 2048, 1536), STATES
    rows = lambda: torch.randn(batch, length, channels)
    columns = lambda: torch.randn(batch, length, states)
    a = -0.1 - 0.9 * torch.rand(channels, states)
    return [rows(), 0.5 * torch.rand(batch, length, channels), a, columns(), columns(),
            torch.rand(channels), rows(), -1 - 3 * torch.rand(channels)]


RETENTIONS = {"ret64": (1, 4096, 8, 64, 128), "ret256": (1, 4096, 8, 256, 512)}
# torchscale's own default; fla's is 64
TORCHSCALE_CHUNK = 512


def retention_inputs(kind):
    batch, length, heads, keys, values = RETENTIONS[kind]
    rows = lambda width: torch.rand(batch, length, heads, width) * 2 - 1
    return [rows(keys), rows(keys), rows(values)]


def decays(heads):
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads)))


def fla_retention(q, k, v):
    """fla's chunkwise form in plain PyTorch: its other forms are Triton kernels or quadratic."""
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    log_decay = decays(q.shape[2]).expand(q.shape[:3])
    return naive_chunk_simple_gla(q, k, v, log_decay)[0]


def torchscale_retention():
    """torchscale's chunkwise form; its masks, which a model computes once for all layers, are not timed."""
    from types import SimpleNamespace

    from torchscale.component.multiscale_retention import MultiScaleRetention

    masks = {}

    def masks_of(heads):
        if heads not in masks:
            log, at = decays(heads), torch.arange(TORCHSCALE_CHUNK).float()
            mask = torch.exp((at[:, None] - at) * log[:, None, None]).tril()
            scale = mask.sum(-1, keepdim=True).sqrt()
            inner = torch.exp(log[:, None] * (at + 1))[None, :, :, None] / (scale / scale[:, -1:])
            value = mask[:, -1] / mask[:, -1].sum(-1, keepdim=True)
            across = torch.exp(log * TORCHSCALE_CHUNK)[None, :, None, None]
            masks[heads] = mask / scale, across, inner, value[None, :, :, None]
        return masks[heads]

    def run(q, k, v):
        batch, length, heads, keys = q.shape
        layer = SimpleNamespace(num_heads=heads, key_dim=keys, head_dim=v.shape[3])
        q, k = q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()
        v = v.reshape(batch, length, -1)
        return MultiScaleRetention.chunk_recurrent_forward(layer, q, k * keys**-0.5, v, masks_of(heads))

    return run


def rfft_convolution(x, k, d, pre_gate, post_gate):
    """As safari's reference has it, channels before time: two transforms of twice the length, one back."""
    v, size = x * pre_gate, 2 * x.shape[-1]
    y = torch.fft.irfft(torch.fft.rfft(v, n=size) * torch.fft.rfft(k, n=size), n=size)[..., : x.shape[-1]]
    return post_gate * (y + v * d[:, None])


def convolution_inputs(length):
    rows = lambda: torch.randn(1, 256, length)
    return [rows(), 0.1 * torch.randn(256, length), torch.randn(256), rows(), rows()]


def modal_inputs(kind):
    """`modal_8k_s2`: so many tokens of 1024 channels, so many complex states (8 where nothing is said)."""
    length, states = (int(part.strip("ks")) for part in (kind + "_s8").split("_")[1:3])
    radius, angle = 0.9 + 0.09 * torch.rand(1024, states), 6 * torch.rand(1024, states) - 3
    residues = torch.randn(1024, states, dtype=torch.complex64)
    return [torch.randn(1, 1024, 1024 * length), torch.polar(radius, angle), residues, torch.randn(1024)]


def modal_spectrum(poles, residues, length):
    """Of the filter that the package stripedhyena materialises."""
    powers = (poles.log()[..., None] * torch.arange(length)).exp()
    return torch.fft.rfft((residues[..., None] * powers).real.sum(1), n=2 * length)


def modal_convolution(u, spectrum, d):
    length = u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, n=2 * length) * spectrum, n=2 * length)[..., :length] + u * d[:, None]


def modal(peer, kind):
    """`rfft` finds the filter's transform ready and gives no state; the package makes it, for every prefill."""
    u, poles, residues, d = modal_inputs(kind)
    if peer == "rfft":
        return modal_convolution, [u, modal_spectrum(poles, residues, u.shape[-1]), d]
    whole = lambda u, poles, residues, d: modal_convolution(u, modal_spectrum(poles, residues, u.shape[-1]), d)
    return whole, [u, poles, residues, d]


def differentiated(run, inputs):
    """Forward alone on plain tensors, and forward with the gradients of everything."""
    def backward():
        for tensor in inputs:
            tensor.grad = None
        run(*inputs).sum().backward()

    return backward


def operator(peer, kind):
    """What computes the operator of a task, and its arguments."""
    if kind == "scan":
        return {"naive": naive_scan, "mambapy": mambapy_scan}[peer], scan_inputs()
    if kind in RETENTIONS:
        return fla_retention if peer == "fla" else torchscale_retention(), retention_inputs(kind)
    if kind.startswith("modal_"):
        return modal(peer, kind)
    return rfft_convolution, convolution_inputs(1024 * int(kind[len("conv_"):-1]))


def measure(peer, task, directory, seconds):
    kind, _, detail = task.partition("-")
    if kind == "scan" or kind in RETENTIONS or kind.startswith(("conv_", "modal_")):
        run, inputs = operator(peer, kind)
        if detail == "fwd":
            with torch.no_grad():
                return {"seconds": repeat(lambda: run(*inputs), seconds)}
        for tensor in inputs:
            tensor.requires_grad_()
        return {"seconds": repeat(differentiated(run, inputs), seconds)}

    peers = {"transformers": Transformers, "mambapy": Mambapy}
    if kind == "block":
        block, x = peers[peer].block(), torch.randn(2, 512, WIDTH)
        if detail == "fwd":
            with torch.no_grad():
                return {"seconds": repeat(lambda: block(x), seconds)}
        x.requires_grad_()
        inputs = [x, *block.parameters()]
        return {"seconds": repeat(differentiated(lambda *_: block(x), inputs), seconds)}

    with torch.inference_mode():
        dtype = torch.bfloat16 if detail == "bf16" else torch.float32
        model = peers[peer](directory, dtype)
        if kind == "prefill":
            ids = torch.tensor([token_ids(int(detail))])
            result = model.prefill(ids)[0].argmax().item()
            return {"seconds": repeat(lambda: model.prefill(ids), seconds), "tokens": int(detail), "token": result}
        state = None
        if peer == "transformers":
            logits, state = model.prefill(torch.tensor([token_ids(16)]))
        else:
            for token in token_ids(16):
                logits, state = model.step(torch.tensor([token]), state)
        carried = [logits, state]

        def step():
            carried[:] = model.step(carried[0].argmax(-1), carried[1])

        return {"seconds": repeat(step, seconds), "tokens": 1}


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2])
    else:
        result = measure(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result))

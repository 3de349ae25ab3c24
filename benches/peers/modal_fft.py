"""Times the FFT form of StripedHyena's modal filter in torch, as the package computes it, beside `cargo bench -- modal_conv`.

    python benches/peers/modal_fft.py

Prints milliseconds, the best of several runs: the convolution alone, and with the state that a prefill needs.
"""

import json
import pathlib
import time

import torch

SHAPES = json.loads((pathlib.Path(__file__).parent.parent / "shapes.json").read_text())["modal_conv"]
RUNS = 5


def filter_of(poles, residues, length):
    times = torch.arange(length)
    return (residues[..., None] * (poles.log()[..., None] * times).exp()).real.sum(1)


def convolve(u, poles, residues, d):
    """`u` is [B, D, L]."""
    length = u.shape[-1]
    k = torch.fft.rfft(filter_of(poles, residues, length), n=2 * length) / (2 * length)
    spectrum = torch.fft.fft(u, n=2 * length)
    y = torch.fft.irfft(spectrum[..., : k.shape[-1]] * k, n=2 * length, norm="forward")[..., :length]
    return y + u * d[:, None], spectrum


def state(spectrum, poles, length):
    powers = torch.fft.fft(poles[..., None] ** torch.arange(length), n=2 * length)
    return torch.fft.ifft(spectrum[..., None, :] * powers, n=2 * length)[..., length - 1]


def best(run):
    run()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


@torch.no_grad()
def main():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for shape in SHAPES:
        batch, width, length, states = (shape[letter] for letter in "BDLS")
        if not shape["name"].startswith("cpu-") or length > 10_000:
            continue
        u = torch.rand(batch, width, length) - 0.5
        poles = torch.polar(0.9 + 0.09 * torch.rand(width, states), 6 * torch.rand(width, states) - 3)
        residues, d = torch.randn(width, states, dtype=torch.complex64), torch.rand(width)
        alone = best(lambda: convolve(u, poles, residues, d))
        both = best(lambda: state(convolve(u, poles, residues, d)[1], poles, length)) if states < 4 else float("nan")
        print(f"{shape['name']}: filter and convolution {alone:.0f} ms, with the state {both:.0f} ms", flush=True)


if __name__ == "__main__":
    main()

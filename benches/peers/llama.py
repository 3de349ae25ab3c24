"""llama.cpp through llama-cpp-python.

usage: llama.py TASK MODEL_DIR SECONDS             (peers.py calls this; the last line printed is JSON)
       llama.py make MODEL_DIR                     (writes f32.gguf and f16.gguf beside model.safetensors)
"""

import ctypes
import json
import os
import resource
import sys
import time

import numpy as np


def token_ids(count):
    return [(i * 7919 + 13) % 50257 for i in range(count)]


def make(directory):
    import gguf
    from safetensors.numpy import load_file

    config = json.load(open(f"{directory}/config.json"))
    tensors = load_file(f"{directory}/model.safetensors")
    names = {"mixer.in_proj.weight": "ssm_in.weight", "mixer.conv1d.weight": "ssm_conv1d.weight",
             "mixer.conv1d.bias": "ssm_conv1d.bias", "mixer.x_proj.weight": "ssm_x.weight",
             "mixer.dt_proj.weight": "ssm_dt.weight", "mixer.dt_proj.bias": "ssm_dt.bias",
             "mixer.A_log": "ssm_a", "mixer.D": "ssm_d", "mixer.out_proj.weight": "ssm_out.weight",
             "norm.weight": "attn_norm.weight"}
    for dtype in ("f32", "f16"):
        writer = gguf.GGUFWriter(f"{directory}/{dtype}.gguf", "mamba")
        writer.add_vocab_size(config["vocab_size"])
        writer.add_tokenizer_model("no_vocab")
        writer.add_context_length(1 << 20)
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_ssm_conv_kernel(config["conv_kernel"])
        writer.add_ssm_inner_size(config["intermediate_size"])
        writer.add_ssm_state_size(config["state_size"])
        writer.add_ssm_time_step_rank(config["time_step_rank"])
        writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
        for name, tensor in tensors.items():
            tensor = np.ascontiguousarray(tensor, dtype=np.float32)
            matrix = tensor.ndim == 2 and not name.endswith("A_log")
            if name.endswith("A_log"):
                tensor = -np.exp(tensor)
            elif name.endswith("conv1d.weight"):
                tensor = tensor[:, 0]
            if name == "backbone.embeddings.weight":
                name = "token_embd.weight"
            elif name == "backbone.norm_f.weight":
                name = "output_norm.weight"
            elif name == "lm_head.weight":
                continue
            else:
                layer, inner = name.removeprefix("backbone.layers.").split(".", 1)
                name = f"blk.{layer}.{names[inner]}"
            writer.add_tensor(name, tensor.astype(np.float16) if matrix and dtype == "f16" else tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def measure(task, directory, seconds):
    import llama_cpp as llama

    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    kind, detail = task.split("-")
    file = "f16.gguf" if detail in ("f16", "bf16") else "f32.gguf"
    model = llama.llama_model_load_from_file(f"{directory}/{file}".encode(), llama.llama_model_default_params())
    if not model:
        sys.exit("llama.cpp does not load the model")
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 4096, 2048, 512
    settings.n_threads = settings.n_threads_batch = os.cpu_count()
    context = llama.llama_init_from_model(model, settings)

    def decode(ids):
        array = (llama.llama_token * len(ids))(*ids)
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(ids))) != 0:
            sys.exit("llama.cpp does not decode")
        logits = llama.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(50280,)).argmax())

    def clear():
        llama.llama_memory_clear(llama.llama_get_memory(context), True)

    times, start = [], time.perf_counter()
    if kind == "prefill":
        ids = token_ids(int(detail))
        while len(times) < 2 or time.perf_counter() - start < seconds:
            clear()
            begin = time.perf_counter()
            token = decode(ids)
            times.append(time.perf_counter() - begin)
        return {"seconds": times[1:], "tokens": len(ids), "token": token}
    token = decode(token_ids(16))
    while len(times) < 2 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        token = decode([token])
        times.append(time.perf_counter() - begin)
    return {"seconds": times[1:], "tokens": 1}


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2])
    else:
        result = measure(sys.argv[1], sys.argv[2], float(sys.argv[3]))
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result))

"""How long does the same LoRA train step take in PyTorch?

Diffusers' WanTransformer3DModel of the Wan2.2 5B sizes with PEFT adapters of rank 32 on the same
ten linears of each block: bfloat16, gradient checkpointing, fused AdamW, one noise level for all
frames, no clipping, no data loading. Prints one line of JSON as train_step.py does. Needs torch,
diffusers and peft.

    python benchmarks/peer_train_step.py --bucket 1280x704x121 --compile
    python benchmarks/peer_train_step.py --tiny --bucket 64x64x5 --attention native   # on a CPU
"""

import argparse
import json
import platform
import statistics
import time

import diffusers
import peft
import torch

WAN22_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "text_dim": 4096}
TINY = {"num_attention_heads": 2, "ffn_dim": 128, "num_layers": 2, "text_dim": 32}
HEAD_DIM = 128
NUM_TEXT = 512
CHANNELS = 48
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bucket", default="1280x704x121", help="width x height x frames")
    parser.add_argument("--compile", action="store_true", help="torch.compile of each block")
    parser.add_argument("--attention", default="_native_cudnn", help="a backend of Diffusers")
    parser.add_argument("--steps", type=int, default=5, help="timed, after a first one")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to check the program")
    args = parser.parse_args()
    width, height, frames = map(int, args.bucket.split("x"))
    latent_TYX = ((frames - 1) // 4 + 1, height // 16, width // 16)
    num_tokens = latent_TYX[0] * (latent_TYX[1] // 2) * (latent_TYX[2] // 2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = TINY if args.tiny else WAN22_5B

    torch.manual_seed(0)
    model = make_model(sizes, device, attention=args.attention)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.compile:
        model.compile_repeated_blocks(fullgraph=False)
    optimizer = torch.optim.AdamW(adapter, lr=1e-5, fused=True)
    like = {"device": device, "dtype": torch.bfloat16}
    latents = torch.randn(1, CHANNELS, *latent_TYX, **like)
    target = torch.randn_like(latents)
    text = torch.randn(1, NUM_TEXT, sizes["text_dim"], **like)
    timestep = torch.tensor([500.0], device=device)

    def run_step() -> tuple[torch.Tensor, torch.cuda.Event | None]:
        (velocity,) = model(
            hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False
        )
        loss = torch.nn.functional.mse_loss(velocity.float(), target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), torch.cuda.current_stream().record_event() if on_gpu else None

    on_gpu = device.type == "cuda"
    start = time.perf_counter()
    loss, done = run_step()
    loss.item()
    first_s = time.perf_counter() - start
    seconds = []
    loss, done = run_step()
    for number in range(args.steps + 1):
        # As in train_step.py, the next step is on its way before this one is waited for.
        start, waited_for = time.perf_counter(), done
        loss, done = run_step()
        if waited_for is not None:
            waited_for.synchronize()
        if number > 0:  # the first one was under way before
            seconds.append(time.perf_counter() - start)
    step_s = statistics.median(seconds)
    result = {
        "program": "diffusers + PEFT, " + ("compiled" if args.compile else "eager"),
        "bucket": args.bucket,
        "tokens": num_tokens,
        "batch": 1,
        "dtype": "bfloat16",
        "activation_checkpointing": True,
        "attention": args.attention,
        "step_s": round(step_s, 4),
        "step_s_all": [round(value, 4) for value in seconds],
        "first_s": round(first_s, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else 0.0,
        "host_gb": 0.0,
        "model_tflops": round(count_flops(sizes, num_tokens) / step_s / 1e12, 1),
        "loss": round(loss.item(), 5),
        "trained": sum(parameter.numel() for parameter in adapter),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "peft": peft.__version__,
        },
    }
    print("RESULT " + json.dumps(result), flush=True)


def make_model(
    sizes: dict[str, int], device: torch.device, *, attention: str
) -> diffusers.WanTransformer3DModel:
    """Draws a bfloat16 model on the device; only its adapters train."""
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            freq_dim=256,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=1e-6,
            rope_max_seq_len=1024,
            **sizes,
        )
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    model.to(torch.bfloat16)
    model.set_attention_backend(attention)
    model.add_adapter(peft.LoraConfig(r=32, lora_alpha=32, target_modules=TARGETS))
    model.enable_gradient_checkpointing()
    return model.train()


def count_flops(sizes: dict[str, int], num_tokens: int) -> float:
    """As in random_model.py, which this program does not import: it would bring JAX in."""
    D, F = sizes["num_attention_heads"] * HEAD_DIM, sizes["ffn_dim"]
    linears = 2 * num_tokens * (6 * D * D + 2 * D * F)
    attention = 4 * num_tokens * (num_tokens + NUM_TEXT) * D
    return (2 * linears + 3.5 * attention) * sizes["num_layers"]


if __name__ == "__main__":
    main()

"""Makes sampling.npz: trajectories of Diffusers' UniPC and DPM++ on Wan2.2's own noise schedule.

Diffusers' schedule differs from the original's, its solvers do not: here they run on sigmas written
down anew from the original's table of 1000 training sigmas. The velocity is a small nonlinear
function that exists in both frameworks. `--check` recomputes and compares instead of writing.
"""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("sampling.npz")
SHAPE = (1, 3, 2, 2, 3)  # latents_BTYXC
GUIDANCE = 3.0
SHIFT = 5.0
CASES = {
    f"{mode}_{solver}_{steps}": (mode, solver, steps)
    for mode, counts in {"t2v": (1, 2, 3, 4, 10, 20, 50), "i2v": (2, 10)}.items()
    for solver in ("unipc", "dpm++")
    for steps in counts
}


def toy_velocity(latents_BTYXC, sigma_BT, text_BSE, *, xp):
    """Mixes neighbours, noise level and text through a tanh; `xp` is numpy, jax.numpy or torch."""
    sigma_BT111 = sigma_BT[:, :, None, None, None]
    neighbour_BTYXC = xp.roll(latents_BTYXC, 1, -1) + xp.roll(latents_BTYXC, 1, 1)
    text_BTYXC = 0 * latents_BTYXC + text_BSE.mean()
    bend_BTYXC = xp.tanh(1.7 * neighbour_BTYXC + text_BTYXC + 0 * sigma_BT111)
    return latents_BTYXC + 0.5 * bend_BTYXC - xp.sin(5 * sigma_BT111) * text_BTYXC


def make_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(22)
    return {
        "noise": rng.normal(size=SHAPE),
        "first_frame": rng.normal(size=(1, 1, *SHAPE[2:])),
        "text": rng.normal(size=(1, 4, 5)) + 0.5,
        "negative": rng.normal(size=(1, 4, 5)) - 0.5,
    }


def main() -> int:
    from golden_file import write_or_check  # beside this script, which is run as one

    arrays = make_inputs()
    for name, (mode, solver, steps) in CASES.items():
        sigmas, timesteps = _schedule(solver, steps)
        arrays[f"{name}/sigmas"], arrays[f"{name}/timesteps"] = sigmas, timesteps
        arrays[f"{name}/samples"] = _run(mode, solver, sigmas, timesteps)
    return write_or_check(GOLDEN, arrays, about=__doc__)


def _schedule(solver: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    alphas = np.linspace(1, 1 / 1000, 1000)[::-1]
    table = (1.0 - alphas).astype(np.float32)
    start = table.max() if solver == "unipc" else np.float32(1)
    sigmas = np.linspace(np.float64(start), 0.0, steps + 1)[:steps]
    sigmas = SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)
    timesteps = np.trunc(sigmas * 1000).astype(np.int64)
    return np.append(sigmas, 0).astype(np.float32), timesteps


def _run(mode: str, solver: str, sigmas: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """Returns what the model sees at each step, then the result: float64 [steps + 1, *SHAPE]."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    torch.set_default_dtype(torch.float64)
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2}
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(solver_type="bh2", **settings)
    else:
        scheduler = DPMSolverMultistepScheduler(
            solver_type="midpoint", algorithm_type="dpmsolver++", **settings
        )
    scheduler.set_timesteps(len(timesteps))
    scheduler.sigmas = torch.from_numpy(sigmas.astype(np.float64))
    scheduler.timesteps = torch.from_numpy(timesteps)
    scheduler.set_begin_index(0)

    inputs = {name: torch.from_numpy(array) for name, array in make_inputs().items()}
    sample = inputs["noise"].clone()
    samples = []
    for timestep in scheduler.timesteps:
        sigma_BT = torch.full(SHAPE[:2], timestep.item() / 1000)
        if mode == "i2v":
            sample[:, :1], sigma_BT[:, 0] = inputs["first_frame"], 0
        samples.append(sample.numpy().copy())
        wanted, unwanted = (
            toy_velocity(sample, sigma_BT, inputs[text], xp=torch) for text in ("text", "negative")
        )
        velocity = unwanted + GUIDANCE * (wanted - unwanted)
        sample = scheduler.step(velocity, timestep, sample, return_dict=False)[0].double()
    if mode == "i2v":
        sample[:, :1] = inputs["first_frame"]
    return np.stack([*samples, sample.numpy()])


if __name__ == "__main__":
    raise SystemExit(main())

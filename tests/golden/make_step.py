"""Makes step.npz: loss and gradients of one accumulated train step, by Diffusers, PEFT and torch.

Run with the ``parity`` extra: ``python tests/golden/make_step.py`` writes the arrays, ``--check``
recomputes them and compares. Model, adapter and their weights are those of make_transformer.py;
what a step adds is drawn from numpy seeds by ``draw_step``, which the test shares. Stored is

    loss/<case>              [A, B], of each example
    gradient/<case>/<name>   by ComfyUI's names: of the mean over all examples

for each case in CASES, with torch's own losses, in float64.
"""

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

GOLDEN = Path(__file__).with_name("step.npz")
CASES = {  # loss, its scale, whether it is masked
    "plain": ("squared", 1.0, False),
    "squared": ("squared", 1.0, True),
    "huber": ("huber", 0.8, True),
}
# Of two micro-batches of two examples: text alone; the first frame given; the first two; the first
# and the last.
SIGMA_ABT = np.array(
    [[[0.7331] * 4, [0, 0.3, 0.3, 0.3]], [[0, 0, 0.9, 0.9], [0, 0.5, 0.5, 0]]], np.float32
)


class StepInputs(NamedTuple):
    """What one step computes with."""

    latents_ABTYXC: np.ndarray
    noise_ABTYXC: np.ndarray
    text_ABSE: np.ndarray
    mask_ABYX: np.ndarray
    sigma_ABT: np.ndarray = SIGMA_ABT

    @property
    def weight_ABT(self) -> np.ndarray:
        """0 on given frames."""
        return (self.sigma_ABT > 0).astype(np.float32)


def draw_step() -> StepInputs:
    """Draws the inputs; masks are quarters from 0 to 1."""
    rng = np.random.default_rng(11)
    shape = (*SIGMA_ABT.shape, 4, 6, 6)
    return StepInputs(
        rng.standard_normal(shape, np.float32),
        rng.standard_normal(shape, np.float32),
        rng.standard_normal((*SIGMA_ABT.shape[:2], 9, 20), np.float32),
        rng.integers(0, 5, (*SIGMA_ABT.shape[:2], 4, 6)).astype(np.float32) / 4,
    )


def _compute() -> dict[str, Any]:
    import torch
    from make_transformer import _add_adapter, _make_reference  # beside this script

    inputs, arrays = draw_step(), {}
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        model, official = _make_reference()
        adapted = _add_adapter(model, official)
        for case in CASES:
            model.zero_grad()
            losses = []
            for micro in range(len(SIGMA_ABT)):
                loss_B = _measure(model, inputs, micro, *CASES[case])
                (loss_B.mean() / len(SIGMA_ABT)).backward()
                losses.append(loss_B.detach().numpy())
            arrays[f"loss/{case}"] = np.stack(losses)
            for name, parameter in adapted.items():
                arrays[f"gradient/{case}/{name}"] = parameter.grad.numpy().copy()
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _measure(model, inputs: StepInputs, micro: int, kind: str, scale: float, masked: bool):
    """Returns the loss of each example of a micro-batch."""
    import torch
    from make_transformer import SIZES
    from torch.nn import functional

    clean, noise, text, mask, sigma_BT = (
        torch.from_numpy(array[micro]).double() for array in inputs
    )
    level = sigma_BT[:, :, None, None, None]
    noisy = (1 - level) * clean + level * noise
    timestep_BT = 1000 * inputs.sigma_ABT[micro]  # float32, as the trainer rounds it
    timestep = torch.from_numpy(np.repeat(timestep_BT, 2 * 3, axis=1)).double()
    text = functional.pad(text, (0, 0, 0, SIZES["text_len"] - text.shape[1]))
    velocity = model(noisy.movedim(-1, 1), timestep, text, return_dict=False)[0].movedim(1, -1)
    target = noise - clean
    if kind == "squared":
        cost = functional.mse_loss(velocity, target, reduction="none")
    else:
        cost = functional.huber_loss(velocity, target, reduction="none", delta=scale)
    if masked:
        cost = cost * mask[:, None, :, :, None]
    trained = [cost[b, sigma_BT[b] > 0].mean() for b in range(len(cost))]
    return torch.stack(trained)


def main() -> int:
    from golden_file import write_or_check  # beside this script, which is run as one

    return write_or_check(GOLDEN, _compute(), about=__doc__)


if __name__ == "__main__":
    raise SystemExit(main())

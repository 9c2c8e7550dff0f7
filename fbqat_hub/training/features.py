"""Train the feature extractor that ships: ``python -m fbqat_hub.training.features``.

Instance discrimination: every training emoji is a class of its own (Wu et al. 2018), learned as in SimCLR (Chen et
al. 2020): among the views of a batch, each made with random shifts, scales, flips, colour changes, noise and blur,
the network must find the other view of the same emoji. The features are taken before a projection that is thrown
away, so they keep more than what tells emoji apart.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from fbqat_hub.evaluation.features import DIMENSIONS, EXTRACTOR, WEIGHTS, OpenMojiFeatures, extract
from fbqat_hub.files import whole
from fbqat_hub.progress import Progress
from fbqat_hub.training.openmoji import ATTRIBUTION, LICENSE, load_openmoji

_TEMPERATURE = 0.1


def pictures(split: str, size: int = 64) -> Tensor:
    """All pictures of a split of OpenMoji: float32 [N, 3, size, size] in [0, 1]."""
    rows = load_openmoji(size)[split]["image"]
    stacked = np.stack([np.asarray(image) for image in rows])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random view of each picture: [N, 3, H, W] in [0, 1] -> the same.

    Shift up to 1/8 of the side, scale 0.8 to 1.2, mirrored in half of the cases; contrast 0.7 to 1.3 and
    channel gains 0.85 to 1.15; in a third of the cases each, noise up to sigma 0.15 and blur up to sigma 1.5 px.
    """
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    zoom, mirror = uniform(0.8, 1.2, count), uniform(-1, 1, count).sign()
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = zoom * mirror, zoom
    theta[:, :, 2] = uniform(-0.25, 0.25, count, 2)  # in half sides
    places = functional.affine_grid(theta, list(images.shape), align_corners=False)
    views = functional.grid_sample(images, places, padding_mode="border", align_corners=False)
    contrast, gains = uniform(0.7, 1.3, count, 1, 1, 1), uniform(0.85, 1.15, count, 3, 1, 1)
    views = 1 - (1 - views) * contrast * gains  # around white, so that the background stays white
    blurred = uniform(0, 1, count) < 1 / 3
    if blurred.any():
        views[blurred] = gaussian_blur(views[blurred], uniform(0.3, 1.5, 1).item())
    sigma = uniform(0, 0.15, count, 1, 1, 1) * (uniform(0, 1, count, 1, 1, 1) < 1 / 3)
    return (views + sigma * torch.randn(views.shape, generator=generator)).clamp(0, 1)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with edges repeated: [N, 3, H, W], ``sigma`` in pixels."""
    radius = math.ceil(3 * sigma)
    window = torch.exp(-torch.arange(-radius, radius + 1).square() / (2 * sigma**2))
    window = (window / window.sum()).expand(3, 1, -1)
    padded = functional.pad(images, (radius,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(padded, window.unsqueeze(2), groups=3), window.unsqueeze(3), groups=3)


def train(
    images: Tensor, steps: int, batch_size: int, learning_rate: float, seed: int
) -> tuple[OpenMojiFeatures, float]:
    """Train on ``images``, float32 [N, 3, 64, 64] in [0, 1], N >= ``batch_size``.

    Returns:
        The model and its last loss in nats (a running mean over about 50 steps; chance is ln(2 batch_size - 1)).
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = OpenMojiFeatures()
    projection = nn.Sequential(nn.Linear(DIMENSIONS, 128), nn.SiLU(), nn.Linear(128, 128))
    parameters = [*model.parameters(), *projection.parameters()]
    adam = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, learning_rate, total_steps=steps, pct_start=0.1)
    partner = torch.arange(2 * batch_size).roll(batch_size)  # view i of the first half and view i of the second
    order = torch.empty(0, dtype=torch.long)
    running = math.log(2 * batch_size - 1)
    with Progress("train features", steps, "step") as progress:
        for _ in range(steps):
            if len(order) < batch_size:
                order = torch.cat([order, torch.randperm(len(images), generator=generator)])
            chosen, order = order[:batch_size], order[batch_size:]
            views = augment(images[chosen].repeat(2, 1, 1, 1), generator)
            embedded = functional.normalize(projection(model(views)), dim=1)
            similarity = (embedded @ embedded.T / _TEMPERATURE).fill_diagonal_(-1e9)  # never its own partner
            loss = functional.cross_entropy(similarity, partner)
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            running += 0.02 * (loss.item() - running)
            progress.update(loss=f"{running:.3f}")
    model.eval().requires_grad_(False)
    model.scale.copy_(extract(model, images).var(dim=0).mean().rsqrt())  # mean variance 1
    return model, running


def retrieval(model: OpenMojiFeatures, images: Tensor, seed: int = 0) -> float:
    """Share of pictures whose augmented view lies nearest (cosine) to their own clean features, in [0, 1]."""
    views = augment(images, torch.Generator().manual_seed(seed))
    clean, moved = extract(model, images), extract(model, views)
    centre = clean.mean(dim=0)
    similarity = functional.normalize(moved - centre, dim=1) @ functional.normalize(clean - centre, dim=1).T
    return (similarity.argmax(dim=1) == torch.arange(len(images))).double().mean().item()


def main(argv: list[str] | None = None) -> None:
    """The command: train, measure on held-out pictures, write the file and print the figures."""
    parser = argparse.ArgumentParser(
        description="Train the feature extractor that ships (about 4 minutes of one core)."
    )
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)

    images = pictures("train")
    held_out = torch.cat([pictures("validation"), pictures("test")])
    started = time.process_time()
    model, loss = train(images, options.steps, options.batch_size, options.learning_rate, options.seed)
    figures = {
        "extractor": EXTRACTOR,
        "data": f"OpenMoji, {len(images)} training pictures at 64 px, {LICENSE}",
        "attribution": ATTRIBUTION,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "train_loss_nats": round(loss, 4),
        "retrieval_held_out": round(retrieval(model, held_out), 4),
        "held_out": len(held_out),
        "cpu_seconds": round(time.process_time() - started),
        "torch": torch.__version__,
        "command": "python -m fbqat_hub.training.features",
    }
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    with whole(options.output) as partial:
        save_file(tensors, partial, metadata={"fbqat_hub": json.dumps(figures, sort_keys=True)})
        partial.chmod(0o644)  # safetensors writes 0600
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

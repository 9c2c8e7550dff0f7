"""A deterministic sampler as one small matrix, so that a phone needs neither diffusers nor a solver's formulas.

The step of every deterministic solver without thresholding is linear: the latents after step k are a fixed combination
of the first noise and of all predictions so far,

    x_(k+1) = M[k, 0] noise + M[k, 1] v_0 + ... + M[k, k+1] v_k,

with weights that depend on the schedule alone. They are read off by running the scheduler itself on unit vectors.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from fbqat_hub.export.errors import ExportError


def _run(scheduler: Any, first: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
    """The samples after each step, [steps, ...], of a fresh copy of `scheduler` with its timesteps set."""
    fresh = type(scheduler).from_config(scheduler.config)
    for name in ("timesteps", "sigmas", "num_inference_steps"):
        if hasattr(scheduler, name):
            setattr(fresh, name, copy.deepcopy(getattr(scheduler, name)))
    if hasattr(fresh, "model_outputs"):
        fresh.model_outputs = [None] * fresh.config.solver_order
    fresh.set_begin_index(0)
    sample, samples = first, []
    for timestep, prediction in zip(fresh.timesteps, predictions, strict=True):
        sample = fresh.step(prediction, timestep, sample, return_dict=False)[0]
        samples.append(sample)
    return torch.stack(samples)


def sampler_matrix(scheduler: Any) -> np.ndarray:
    """M of the module's formula, float32 [steps, 1 + steps].

    Args:
        scheduler: a diffusers scheduler after `set_timesteps` (a pipeline's own, after one picture).

    Raises:
        ExportError: a step is not linear (thresholding), or adds noise of its own.
    """
    config = scheduler.config
    stochastic = config.get("stochastic_sampling") or str(config.get("algorithm_type", "")).startswith("sde")
    if stochastic or config.get("thresholding"):
        raise _not_linear(scheduler)
    steps = len(scheduler.timesteps)
    unit = torch.eye(1 + steps)
    matrix = _run(scheduler, unit[0], unit[1:])
    values = torch.randn(1 + steps, 1, generator=torch.Generator().manual_seed(0))
    sampled = _run(scheduler, values[0], values[1:])
    if not torch.allclose(sampled, matrix @ values, rtol=1e-3, atol=1e-3):
        raise _not_linear(scheduler)
    return matrix.numpy().astype(np.float32)


def _not_linear(scheduler: Any) -> ExportError:
    return ExportError(
        f"{type(scheduler).__name__} is not a linear function of its predictions as it is configured (noise of its "
        "own, or thresholding): use a deterministic scheduler, e.g. FlowMatchEulerDiscreteScheduler"
    )

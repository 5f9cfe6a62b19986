"""Flow matching: noise levels, steps between them, guidance. Functions over tensors and floats that know no model."""

from longburn.diffusion.guidance import (
    AdaptiveProjected,
    StepInterval,
    angle_based,
    classifier_free,
    double_condition,
    zero_star,
)
from longburn.diffusion.recorded import Recorded
from longburn.diffusion.run import Cancelled, OnStep, SamplingCancelledError, Velocity, draw_noise, run_steps, seeded
from longburn.diffusion.schedules import (
    Schedule,
    flow_schedule,
    heun_levels,
    nearest_level,
    shifted,
    turbo_schedule,
    v1_schedule,
    v1_start_level,
)
from longburn.diffusion.steppers import denoised, euler, heun, noised, omega_weight, renoise

__all__ = [
    "AdaptiveProjected",
    "Cancelled",
    "OnStep",
    "Recorded",
    "SamplingCancelledError",
    "Schedule",
    "StepInterval",
    "Velocity",
    "angle_based",
    "classifier_free",
    "denoised",
    "double_condition",
    "draw_noise",
    "euler",
    "flow_schedule",
    "heun",
    "heun_levels",
    "nearest_level",
    "noised",
    "omega_weight",
    "renoise",
    "run_steps",
    "seeded",
    "shifted",
    "turbo_schedule",
    "v1_schedule",
    "v1_start_level",
    "zero_star",
]

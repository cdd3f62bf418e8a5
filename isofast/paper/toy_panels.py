"""The simulations behind the paper's Fig. 2, 5 and 6, each by a name that is also its NPZ key."""

import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from isofast.paper.theory import Trajectory, initial_weights, randn, simulate, stream
from isofast.paper.toy import Toy

METRICS = ("euclidean", "cosine")
VARIANTS: dict[str, dict[str, bool]] = {
    "no_stop_gradient": {"stop_gradient": False},
    "paper_gradient": {"stop_gradient": False, "paper_gradient": True},
    "no_predictor": {"predictor": False},
    "plain": {},
    "iso": {},
}
PLANE_STEPS, PLANE_SAMPLES = 1500, 10
"""In the plane every loss runs as long, on so many times the samples: the cosine's gradient there,
about 1 / |z|, has no variance, so that 100,000 steps on few samples show a random walk."""
SPECTRUM: dict[str, Any] = {"inputs": 15, "outputs": 10}
PLANE: dict[str, Any] = {"inputs": 6, "outputs": 2, "lr": 0.01}
INITIALISATIONS = ("V0", "2 V0", "randn / 2")
RECORDS = 301
SMALL_WORK = 200_000
"""In the units of `_work`, about ten seconds: up to here one process does it all."""
POINTS, CANDIDATES = 20, 5000
"""Points followed in the plane: the longest of so many, as they show the motion best."""


@dataclass(frozen=True)
class Panel:
    """One simulation of a figure; ``three`` starts it from V0, 2 V0 and randn/2 at once."""

    name: str
    toy: Toy
    three: bool = False


def panels_of(
    figure: str, *, seed: int = 0, samples: int = Toy.samples, steps: int | None = None
) -> list[Panel]:
    """The simulations of a figure.

    Args:
        figure: "figure2", "figure5" or "figure6".
        seed, samples, steps: as in `Toy`, for all of them.
    """
    plane = {
        **PLANE,
        "seed": seed,
        "samples": PLANE_SAMPLES * samples,
        "steps": PLANE_STEPS if steps is None else steps,
    }
    if figure == "figure5":
        return [Panel(metric, Toy(loss=metric, **plane), three=True) for metric in METRICS]
    relu = figure == "figure6"
    spectrum = {**SPECTRUM, "seed": seed, "samples": samples, "steps": steps}
    return [
        Panel(f"{metric}_{variant}_{kind}", Toy(relu=relu, **settings, **sizes))
        for metric, variant, settings in _losses()
        for kind, sizes in (("spectrum", spectrum), ("plane", plane))
    ]


def _losses() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for metric in METRICS:
        for variant, settings in VARIANTS.items():
            if variant == "paper_gradient" and metric == "euclidean":
                continue
            loss = f"iso_{metric}" if variant == "iso" else metric
            yield metric, variant, {"loss": loss, **settings}


def run_panels(
    panels: list[Panel], *, workers: int | None = None, done: Callable[[str], None] = print
) -> dict[str, Trajectory]:
    """Simulates every panel; the result does not depend on the number of processes.

    Args:
        panels: from `panels_of`.
        workers: processes, of one thread and up to 600 MB each. If left out one a core, up to
            the number of panels and to where the longest panel alone decides the time; a single
            one for a few seconds' work.
        done: told the name of each panel that is ready.

    Returns:
        A trajectory by the panel's name, in the order of ``panels``.

    Raises:
        RunError: a simulation left the finite numbers; it ends the others too.
    """
    workers = _useful_workers(panels, _cores()) if workers is None else workers
    # the longest first, so that no core ends up waiting for one that began late
    longest_first = sorted(panels, key=_work, reverse=True)
    found: dict[str, Trajectory] = {}
    if workers <= 1:
        for panel in longest_first:
            found[panel.name] = _run(panel)
            done(panel.name)
    else:
        found = _run_in_processes(longest_first, workers, done)
    return {panel.name: found[panel.name] for panel in panels}


def arrays_of(trajectories: Mapping[str, Trajectory]) -> dict[str, NDArray[Any]]:
    """What the NPZ holds: NAME_steps (T,), NAME_eigenvalues (T, S, M), NAME_points (T, S, P, M)."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, trajectory in trajectories.items():
        arrays[f"{name}_steps"] = trajectory.steps
        arrays[f"{name}_eigenvalues"] = trajectory.eigenvalues
        arrays[f"{name}_weight_eigenvalues"] = trajectory.weight_eigenvalues
        if trajectory.points.size:
            arrays[f"{name}_points"] = trajectory.points
    return arrays


def longest_points(seed: int, inputs: int) -> Tensor:
    """The inputs (P, N) followed in the plane."""
    x_PN = randn((CANDIDATES, inputs), stream(seed, 2))
    return x_PN[torch.linalg.vector_norm(x_PN, dim=-1).argsort(descending=True)[:POINTS]]


def three_starts(toy: Toy) -> Tensor:
    """V0, 2 V0 and randn/2, (3, M, N) (P Fig. 5)."""
    v_1MN = initial_weights(toy)
    other_1MN = randn(tuple(v_1MN.shape), stream(toy.seed, 3)) / 2
    return torch.cat([v_1MN, 2 * v_1MN, other_1MN])


def _run(panel: Panel) -> Trajectory:
    toy = panel.toy
    plane = toy.outputs == PLANE["outputs"]
    return simulate(
        toy,
        three_starts(toy) if panel.three else None,
        points_PN=longest_points(toy.seed, toy.inputs) if plane else None,
        records=RECORDS,
    )


def _run_in_processes(
    panels: list[Panel], workers: int, done: Callable[[str], None]
) -> dict[str, Trajectory]:
    """The trajectories; the first error and an interruption end every process at once."""
    others = {*multiprocessing.active_children()}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,))
    found: dict[str, Trajectory] = {}
    try:
        # Ctrl-C is for this process to hear: workers inherit the mask, from their first import on
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            names = {pool.submit(_run, panel): panel.name for panel in panels}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for future in as_completed(names):
            found[names[future]] = future.result()
            done(names[future])
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        # by themselves they would end only after their panels, in minutes
        for worker in {*multiprocessing.active_children()} - others:
            worker.terminate()
        raise
    pool.shutdown()
    return found


def _useful_workers(panels: list[Panel], cores: int) -> int:
    work = [_work(panel) for panel in panels]
    # a process takes seconds to start
    if sum(work) < SMALL_WORK:
        return 1
    # while the longest panel runs on one core, so many in all have time for the rest
    return min(cores, len(panels), math.ceil(sum(work) / max(work)))


def _work(panel: Panel) -> float:
    """Something like the time it takes, in units of 30 to 60 microseconds."""
    toy = panel.toy
    return toy.default_steps * (1 if toy.exact else 5 + toy.samples * toy.inputs / 1000)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""What an agent recalled of one unseen episode of Ballet, when it first had to choose."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from htm_pytorch.envs import ballet_tables as tables
from htm_pytorch.nn import HTMTransformer
from htm_pytorch.rl import Agent, TrainConfig
from htm_pytorch.rl.evaluation import watch


class Moment(NamedTuple):
    """A choice, and what was recalled for it."""

    pictures: np.ndarray
    """[T, 99, 99, 3] uint8, every frame up to the choice, which is the last."""
    weights: np.ndarray
    """[T], the weight of each frame in what was recalled, mean over heads; they sum to 1."""
    chunk_size: int
    instruction: str
    action: str
    success: bool


def draw(agent: Agent, config: TrainConfig, path: Path) -> Path | None:
    """Play an unseen episode and draw what was recalled in it; None: the agent recalls nothing."""
    if not isinstance(agent.core, HTMTransformer) or not agent.core.mem_chunks:
        return None
    plot_recall(_moment(agent, agent.core, config), path)
    return path


def plot_recall(moment: Moment, path: Path, best: int = 8) -> None:
    """Draw the choice, the weight of every past frame, and the `best` frames recalled most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[3, 2])
    top, bottom = (figure.add_subfigure(cell) for cell in grid)
    choice, bars = top.subplots(1, 2, width_ratios=[1, 3])
    now = len(moment.pictures) - 1
    choice.imshow(moment.pictures[now])
    verdict = "finds it" if moment.success else "does not find it"
    top.suptitle(f"step {now}: who danced {moment.instruction}? goes {moment.action}, {verdict}")
    choice.axis("off")

    size = moment.chunk_size
    for chunk in range(now // size):
        share = moment.weights[chunk * size : (chunk + 1) * size].sum()
        if share < 0.005:
            continue
        start, end = chunk * size - 0.5, (chunk + 1) * size - 0.5
        bars.axvspan(start, end, color="tab:orange", alpha=0.05 + 0.35 * share)
        label = f"chunk {chunk}\n{share:.0%}"
        place = ((start + end) / 2, 0.97)
        bars.annotate(label, place, xycoords=("data", "axes fraction"), ha="center", va="top")
    bars.bar(np.arange(now + 1), moment.weights, color="tab:blue")
    bars.set(xlabel="step of the past", ylabel="weight in what was recalled")
    bars.set_xlim(-0.5, now + 0.5)
    bars.margins(y=0.35)

    strongest = np.sort(np.argsort(moment.weights[:now])[::-1][:best])
    frames = np.atleast_1d(bottom.subplots(1, len(strongest)))
    bottom.suptitle("the frames it recalled most")
    for frame, step in zip(frames, strongest, strict=True):
        frame.imshow(moment.pictures[step])
        frame.set_title(f"step {step}: {moment.weights[step]:.0%}", fontsize="small")
        frame.axis("off")
    figure.savefig(path, dpi=120)


@torch.no_grad()
def _moment(agent: Agent, core: HTMTransformer, config: TrainConfig) -> Moment:
    rollout, total = watch(agent, config)
    seen, at = rollout.seen, rollout.at[:, :1]
    features, _, recalls = core.recall(agent.encode(seen), None, seen.is_first, at=at)
    recall, size, now = recalls[-1], config.memories.mem_chunk_size, int(at)
    # Chunks of this one call are counted behind the ring's empty slots.
    chunks = recall.chunks[0, 0] - core.mem_chunks
    weights = np.zeros(now + 1)
    for rank, chunk in enumerate(chunks.tolist()):
        if chunk >= 0:
            steps = slice(chunk * size, (chunk + 1) * size)
            inside = recall.step_weights[0, 0, :, rank].mean(0)
            weights[steps] += (recall.chunk_weights[0, 0, rank] * inside).numpy()
    shown = seen.observation
    if "symbols" in shown:
        pictures = np.stack([tables.draw(frame) for frame in shown["symbols"][0].numpy()])
    else:
        pictures = shown["image"][0].numpy()
    action = agent.distribution(agent.heads(features).policy[:, 0]).mode()
    return Moment(
        pictures=pictures[: now + 1],
        weights=weights,
        chunk_size=size,
        instruction=tables.INSTRUCTIONS[int(shown["instruction"][0, now])],
        action=list(tables.DIRECTIONS)[int(action)],
        success=total > 0,
    )

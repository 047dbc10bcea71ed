"""`htm report`: what a trained agent recalled, as a page, a picture and numbers."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import tyro

from htm_pytorch import tasks


def report(
    run_dir: tyro.conf.Positional[Path],
    out: Path | None = None,
    episodes: int = 0,
    seed: int | None = None,
    actions: Literal["greedy", "sampled"] = "greedy",
    picture: Path | None = None,
    film: Path | None = None,
    moment: int = 0,
) -> None:
    """Show what a trained agent recalled in an unseen episode, as one HTML file.

    Args:
        run_dir: folder of the run.
        out: the file; default report.html in the folder of the run.
        episodes: of which is measured how often the chunk asked about is recalled; 0: nothing is.
        seed: of the episodes; default one that the training did not use.
        actions: the most probable ones, or sampled as in training.
        picture: a file for a picture of one moment, .png, .pdf or .svg.
        film: a file for moving pictures of all moments, .gif or .mp4.
        moment: the number of the decision that the picture shows; -1 is the last.
    """
    from htm_pytorch.report import draw_moment, film_moments, measure, trace_agent, write_report
    from htm_pytorch.report.page import check_path
    from htm_pytorch.report.picture import PICTURES
    from htm_pytorch.report.scene import Scene
    from htm_pytorch.rl.checkpoint import checkpoint_of
    from htm_pytorch.rl.evaluation import load_agent
    from htm_pytorch.rl.plots import check_film

    if episodes < 0:
        raise ValueError(f"episodes: expected 0 or more, got {episodes}")
    name = checkpoint_of(run_dir).config.task
    # Before an episode is played.
    page = check_path("out", run_dir / "report.html" if out is None else out, ".html")
    if picture is not None:
        check_path("picture", picture, *PICTURES)
    if film is not None:
        check_film("film", film)
    task = tasks.find(name) if name else None
    scene = Scene() if task is None or task.scene is None else task.scene()
    agent, config, stage = load_agent(run_dir, tasks.parts_of(name))
    if seed is not None:
        config = config.replace(seed=seed)
    greedy = actions == "greedy"
    title = f"What {run_dir.resolve().name} recalled: {name or config.env}"
    trace = trace_agent(agent, config, stage=stage, greedy=greedy, scene=scene, title=title)
    count = len(trace.moments)
    if picture is not None and not -count <= moment < count:
        raise ValueError(f"moment: expected one of {count} decisions, got {moment}")
    facts = dict(trace.facts)
    if episodes:
        truth = measure(agent, config, episodes, scene, stage=stage, greedy=greedy)
        print(truth)
        facts["unseen episodes"] = str(truth)
        page.with_suffix(".json").write_text(json.dumps(truth.as_dict(), indent=2) + "\n")
    write_report(dataclasses.replace(trace, facts=facts), page)
    print(f"{page}: {page.stat().st_size / 1000:.0f} kB")
    if picture is not None:
        print(draw_moment(trace, picture, moment))
    if film is not None:
        print(film_moments(trace, film))


COMMAND = report


def draw_recall(run_dir: Path) -> Path | None:
    """Draw what the agent of a run recalled when it first had to choose, in the run's folder.

    Return where that is; None where the task says nothing of how it is shown, or the agent recalls
    no chunks.
    """
    from htm_pytorch.report import draw_moment, trace_agent
    from htm_pytorch.rl.checkpoint import checkpoint_of
    from htm_pytorch.rl.evaluation import load_agent

    recorded = checkpoint_of(run_dir).config
    task = tasks.find(recorded.task) if recorded.task else None
    if task is None or task.scene is None or recorded.memories.memory != "htm":
        return None
    agent, config, stage = load_agent(run_dir, tasks.parts_of(recorded.task))
    trace = trace_agent(agent, config, stage=stage, scene=task.scene())
    return draw_moment(trace, run_dir / "recall.png")


def main(arguments: list[str]) -> None:
    """Parse and report."""
    tyro.cli(report, args=arguments, prog="htm report")

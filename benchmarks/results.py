"""What agents remember: every task, memory and seed, and docs/results.md from their records.

    python benchmarks/results.py                                 # what is missing, then the page
    python benchmarks/results.py --task t-maze --memory htm      # some of it
    python benchmarks/results.py --write                         # the page alone

A training that is broken off goes on where it was. What was measured is kept in docs/runs, from
which the page and its picture are made; nothing in them comes from elsewhere.
"""

import argparse
import csv
import json
import math
import os
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from htm_pytorch.envs.endless_t_maze import ENDLESS_SETTINGS

ROOT = Path(__file__).parents[1]
RECORDS, PAGE, PICTURE = ROOT / "docs/runs", ROOT / "docs/results.md", ROOT / "docs/results.png"
WORK = ROOT / "runs/results"
ROWS = 200
"""Of a metrics.csv that is kept."""
KEPT = ("config.json", "versions.json", "evaluations.jsonl")
COLOURS = {"htm": "#0b3c8c", "window": "#e08a00", "gru": "#7a7a7a", "lstm": "#b0b0b0"}


@dataclass(frozen=True)
class Level:
    """What an agent is judged on."""

    name: str
    env_args: tuple[str, ...] = ()
    """That replace those of the training."""
    mem_chunks: int | None = None
    """Chunks a layer remembers then; None: as in the training."""
    episodes: int | None = None
    published: str = "not available"
    """Figures of others for the same task and metric, with their source."""
    ways: tuple[bool, ...] = (True, False)
    """Whether the most probable actions are taken; both ways, or only one."""


@dataclass(frozen=True)
class Row:
    """One training and all that its agent is judged on."""

    name: str
    """Of the row; where `task` is not given, of the task, too."""
    about: str
    chance: str
    levels: tuple[Level, ...]
    memories: tuple[str, ...] = ("htm", "window", "gru", "lstm")
    seeds: tuple[int, ...] = (0, 1, 2)
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """That differ from the task's preset."""
    task: str = ""
    """Whose preset it is."""

    @property
    def preset(self) -> str:
        """The name of the task whose preset it is."""
        return self.task or self.name


ELMUR = "1.0, by imitating an oracle (ELMUR, arXiv 2510.07151)"
# Within the window: what is asked for is a matter of distance alone.
_REPEAT: dict[str, Any] = {
    "num_envs": 64,
    "steps": 160,
    "learning_rate": 1e-3,
    "discount": 0.5,
    "mem_chunk_size": 16,
    "mem_chunks": 12,
    "topk_mems": 2,
    "frames": 1_000_000,
    "stop_at": 0.97,
    "eval_episodes": 500,
}


def _repeat(kind: str, distance: int, published: str) -> Row:
    """Return POPGym's RepeatPrevious, with a window that covers its distance."""
    name = f"RepeatPrevious{kind}"
    mmer = f"MMER {published} at 15 M frames (LMU, POPGym table 3)"
    return Row(
        f"repeat-previous-{kind.lower()}",
        f"POPGym {name}: what was seen {distance} steps before",
        "-.5",
        (Level("1.0 at best", published=mmer),),
        options=_REPEAT | {"env": f"popgym:popgym-{name}-v0", "window": distance + 8},
        task="repeat-previous",
    )


def _autoencode(kind: str, cards: int, published: str) -> Row:
    """Return POPGym's Autoencode of so many cards."""
    name = f"Autoencode{kind}"
    return Row(
        f"autoencode-{kind.lower()}",
        f"POPGym {name}: {cards} cards, backwards; with a clock",
        "-.5",
        (Level("1.0 at best", episodes=500, published=published),),
        seeds=(0,),
        options={"env": f"popgym:popgym-{name}-v0"},
        task="autoencode",
    )


def _endless() -> tuple[Level, ...]:
    """Return all sixteen settings, the hardest first."""
    levels: list[Level] = []
    for setting, given in reversed(ENDLESS_SETTINGS.items()):
        kind, length, corridors = setting.split("-")
        arguments = tuple(f"{k}={json.dumps(v, separators=(',', ':'))}" for k, v in given.items())
        name = f"{kind} {length}, {corridors} corridor{'s' * (corridors != '1')}"
        levels.append(Level(name, arguments, ways=(True,)))
    return tuple(levels)


DANCERS = "a dancer at random: 1 of their number"


def _ballet(*levels: tuple[int, int]) -> tuple[Level, ...]:
    """Return levels of Ballet, of so many dancers and delays."""
    return tuple(
        Level(
            f"{dancers} dancers, delay {delay}",
            (f"num_dancers={dancers}", f"dance_delay={delay}"),
            ways=(True,),
        )
        for dancers, delay in levels
    )


_BALLET_2_DELAY_16: dict[str, Any] = {
    "env_args": ("observation=symbols", "num_dancers=2", "dance_delay=16"),
    "curriculum": (),
    "rehearse": 0.0,
    "frames": 12_000_000,
    "stop_at": 0.99,
}

PLAN = (
    Row(
        "t-maze",
        "T-Maze, trained on corridors up to 100 by reinforcement alone",
        ".5",
        (
            Level("100 or less"),
            Level("9,600", ("length=9600",), 602, 100, ELMUR, ways=(True,)),
            Level("100,000", ("length=100000",), 6_252, 100, ways=(True,)),
        ),
    ),
    Row(
        "t-maze-million",
        "The same, 1,000,000 steps (14 GB of memory for 100 episodes at once)",
        ".5",
        (Level("1,000,000", ("length=1000000",), 62_502, 100, ways=(True,)),),
        memories=("htm",),
        seeds=(0,),
        task="t-maze",
    ),
    Row(
        "proof-of-memory",
        "ProofofMemory, 25,000 frames",
        "",
        (Level("1.2 at best"),),
    ),
    Row(
        "repeat-first",
        "POPGym RepeatFirstHard: what was seen first, for 830 steps; with a clock",
        "-.5",
        (
            Level(
                "1.0 at best",
                episodes=500,
                published="MMER .969 at 15 M frames (IndRNN, POPGym table 3)",
                ways=(True,),
            ),
        ),
        seeds=(0,),
        options={"frames": 1_500_000},
    ),
    _repeat("Medium", 32, ".789"),
    _repeat("Hard", 64, ".191"),
    _autoencode("Easy", 52, "MMER .495 at 15 M frames (SHM, arXiv 2410.10132)"),
    *(
        Row(
            f"memory-{size.lower()}",
            f"MiniGrid-Memory{size}, 2,000,000 frames",
            "half of the best",
            (Level("nearly 1 at best", episodes=500, ways=(True,)),),
            seeds=(0,),
            options={"env": f"minigrid:MiniGrid-Memory{size}-v0"},
            task="memory-s7",
        )
        for size in ("S9", "S11")
    ),
    Row(
        "endless-t-maze",
        "Endless T-Maze, ten corridors of up to 10, at most 16,000,000 frames",
        "",
        _endless(),
    ),
    Row(
        "visual-match",
        "Visual match, trained with up to 60 steps of distraction",
        ".33",
        tuple(
            Level(
                f"{steps} steps of distraction",
                (f"distraction={steps}", "explore=15", "choice=30"),
                chunks,
            )
            for steps, chunks in ((60, None), (250, 40), (500, 72))
        ),
        options={"frames": 6_000_000},
    ),
    Row(
        "rapid-binding",
        "Rapid binding, trained with up to 2 phases of distraction",
        "a third of the best",
        tuple(
            Level(
                f"{phases} phases, {rounds} round{'s' * (rounds > 1)}, {best} at best",
                (f"distractions={phases}", f"rounds={rounds}"),
                chunks,
                ways=(True,),
            )
            for phases, rounds, best, chunks in (
                (2, 1, 3, 16),
                (10, 1, 3, 40),
                (20, 1, 3, 72),
                (2, 3, 15, 72),
            )
        ),
    ),
    Row(
        "ballet-levels",
        "Ballet from symbols, all levels by one agent, 20,000,000 frames",
        DANCERS,
        _ballet((2, 16), (4, 16), (8, 16), (2, 48), (4, 48), (8, 48)),
    ),
    Row(
        "ballet-2-delay-16",
        "Ballet from symbols, 2 dancers with delays of 16, from nothing",
        DANCERS,
        _ballet((2, 16)),
        options=_BALLET_2_DELAY_16,
        task="ballet-levels",
    ),
    Row(
        "ballet-pictures",
        "Ballet from pictures of 99 x 99, 2 dancers with delays of 16, from nothing",
        DANCERS,
        _ballet((2, 16)),
        seeds=(0,),
        options=_BALLET_2_DELAY_16
        | {"env_args": ("observation=image", "num_dancers=2", "dance_delay=16")},
        task="ballet-levels",
    ),
    Row(
        "ballet-more-dancers",
        "Ballet from symbols, trained with 2 and 4 dancers alone",
        DANCERS,
        _ballet((4, 1), (4, 16), (8, 1), (8, 16)),
        options={
            "curriculum": tuple(
                json.dumps({"num_dancers": dancers, "dance_delay": delay})
                for dancers, delay in ((4, 1), (2, 1), (2, 16), (4, 16))
            ),
            "frames": 14_000_000,
            "stop_at": 0.985,
        },
        task="ballet-levels",
    ),
)


def folder(row: Row, memory: str, seed: int) -> str:
    """Return where the record of a training is, below all records."""
    return f"{row.name}/{memory}-{seed}"


def train(row: Row, memory: str, seed: int) -> Path:
    """Train, from where it was broken off, and return the folder of the run."""
    from dataclasses import replace

    from htm_pytorch import rl, tasks

    place = WORK / folder(row, memory, seed)
    options = dict(row.options) | {"memory": memory, "seed": seed, "run_dir": place}
    preset = replace(tasks.find(row.preset).config, task=row.preset)
    rl.train(preset.replace(resume=True, **options), tasks.parts_of(row.preset))
    return place


def judge(row: Row, level: Level, place: Path) -> None:
    """Judge an agent on one level, by its most probable actions and by sampled ones."""
    from htm_pytorch import rl, tasks
    from htm_pytorch.rl.checkpoint import checkpoint_of

    has_chunks = checkpoint_of(place).config.memories.memory == "htm"
    for greedy in level.ways:
        if not _means(place, level, greedy):
            rl.evaluate(
                place,
                level.episodes,
                greedy=greedy,
                parts=tasks.parts_of(row.preset),
                env_args=level.env_args,
                mem_chunks=level.mem_chunks if has_chunks else None,
                patience=2**40,
            )


def keep(place: Path, record: Path) -> None:
    """Copy what was measured, and of the curve as many rows as a picture needs."""
    record.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        (record / name).write_bytes((place / name).read_bytes())
    with (place / "metrics.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    step = max(1, -(-len(rows) // ROWS))
    with (record / "metrics.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows[::-step][::-1]])


def is_whole(row: Row, record: Path) -> bool:
    """Say whether all that is asked of a training was measured."""
    return all(_means(record, level, greedy) for level in row.levels for greedy in level.ways)


def _means(place: Path, level: Level, greedy: bool) -> list[float]:
    """Return the mean returns of an agent on a level, as often as it was judged."""
    path = place / "evaluations.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [
        line["mean"]
        for line in lines
        if line["greedy"] == greedy
        and tuple(line.get("env_args", ())) == level.env_args
        # None is said of a memory that has no chunks.
        and line.get("mem_chunks") in (None, level.mem_chunks)
        and level.episodes in (None, line["episodes"])
    ]


def _spread(values: list[float]) -> str:
    if not values:
        return "not run"
    mean = statistics.mean(values)
    return f"{mean:.3f} +- {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def table(row: Row) -> list[str]:
    """Return the lines of a task: results, then what they took."""
    memories = [m for m in row.memories if any(_records(row, m))]
    if not memories:
        return []
    lines = [f"## {row.about}", ""]
    lines += [f"Chance, or no memory: {row.chance}.", ""] if row.chance else []
    lines += ["| unseen episodes | " + " | ".join(memories) + " | published |"]
    lines += ["|---|" + "---:|" * len(memories) + "---|"]
    for level in row.levels:
        for greedy in level.ways:
            how = "greedy" if greedy else "sampled"
            cells = [
                _spread(
                    [m for record in _records(row, memory) for m in _means(record, level, greedy)]
                )
                for memory in memories
            ]
            lines.append(f"| {level.name}, {how} | {' | '.join(cells)} | {level.published} |")
    lines += ["", "| of the training | " + " | ".join(memories) + " |"]
    lines += ["|---|" + "---:|" * len(memories)]
    facts = {memory: [_facts(record) for record in _records(row, memory)] for memory in memories}
    for name in facts[memories[0]][0]:
        values = [[fact[name] for fact in facts[memory]] for memory in memories]
        told = [_spread(v) if "return" in name else f"{statistics.mean(v):,.0f}" for v in values]
        lines.append(f"| {name} | {' | '.join(told)} |")
    lines.append(f"| seeds | {' | '.join(str(len(facts[memory])) for memory in memories)} |")
    return [*lines, ""]


def _records(row: Row, memory: str) -> list[Path]:
    places = [RECORDS / folder(row, memory, seed) for seed in row.seeds]
    return [place for place in places if (place / "metrics.csv").exists()]


def _curve(record: Path) -> list[dict[str, str]]:
    with (record / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _hardest(curve: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows of the last stage that was reached, beside which others may be rehearsed."""
    last = max(int(step["stage"]) for step in curve)
    return [step for step in curve if int(step["stage"]) == last]


def _facts(record: Path) -> dict[str, float]:
    curve = _curve(record)
    frames, seconds = int(curve[-1]["frames"]), float(curve[-1]["seconds"])
    curve = _hardest(curve)
    returns = map(float, (step["return"] for step in curve))
    return {
        "return at its end": float(curve[-1]["return"]),
        # Before the first episode has ended there is none.
        "best mean return (MMER)": max(value for value in returns if not math.isnan(value)),
        "frames": frames,
        "frames a second": frames / seconds,
    }


def _found(field: re.Match[str]) -> str:
    """Return the result that `{row|memory|level}` asks for, of the most probable actions."""
    name, memory, about = field.groups()
    row = next(row for row in PLAN if row.name == name)
    level = next(level for level in row.levels if level.name == about)
    records = _records(row, memory)
    return _spread([mean for record in records for mean in _means(record, level, greedy=True)])


def draw() -> None:
    """Draw the curves of all tasks that were trained, the memories side by side."""
    from matplotlib.figure import Figure

    rows = [row for row in PLAN if any(_records(row, memory) for memory in row.memories)]
    figure = Figure(figsize=(4 * min(3, len(rows)), 2.8 * -(-len(rows) // 3)), layout="constrained")
    every = figure.subplots(-(-len(rows) // 3), min(3, len(rows)), squeeze=False).flatten()
    for axes, row in zip(every, rows, strict=False):
        for memory in row.memories:
            for number, record in enumerate(_records(row, memory)):
                curve = _hardest(_curve(record))
                x = [int(step["frames"]) for step in curve]
                y = [float(step["return"]) for step in curve]
                label = memory if number == 0 else None
                axes.plot(x, y, color=COLOURS.get(memory), label=label, linewidth=1)
        axes.set(title=row.name, xlabel="frames", ylabel="return")
    for axes in every[len(rows) :]:
        axes.axis("off")
    every[0].legend()
    figure.savefig(PICTURE, dpi=110)


def write() -> None:
    """Write the page and its picture from the records."""
    draw()
    head = (Path(__file__).with_name("results_head.md")).read_text()
    head = re.sub(r"\{([^|{}]+)\|([^|{}]+)\|([^|{}]+)\}", _found, head)
    body = [line for row in PLAN for line in table(row)]
    PAGE.write_text(head + "\n".join(body).rstrip() + "\n")


def main() -> None:
    """Train what is missing, judge it, keep the record, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=[row.name for row in PLAN])
    parser.add_argument("--memory", help="only this memory")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument("--write", action="store_true", help="write the page alone")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for row in () if asked.write else PLAN:
        for memory in row.memories:
            for seed in row.seeds:
                wanted = (asked.task in (None, row.name)) and asked.memory in (None, memory)
                record = RECORDS / folder(row, memory, seed)
                if not wanted or asked.seed not in (None, seed) or is_whole(row, record):
                    continue
                print(f"{row.name}, {memory}, seed {seed}", flush=True)
                place = train(row, memory, seed)
                for level in row.levels:
                    judge(row, level, place)
                keep(place, record)
    write()


if __name__ == "__main__":
    main()

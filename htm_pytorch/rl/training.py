"""Training: one loop, read from top to bottom."""

import contextlib
import sys
import time
from typing import Any

import numpy as np
import torch

from htm_pytorch.rl.agent import Agent, Parts
from htm_pytorch.rl.checkpoint import CHECKPOINT, Checkpoint
from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.evaluation import judge
from htm_pytorch.rl.launching import restarted
from htm_pytorch.rl.learner import Learner, Losses
from htm_pytorch.rl.making import seeds_of
from htm_pytorch.rl.plots import plot_curve
from htm_pytorch.rl.preparing import prepare
from htm_pytorch.rl.processes import World
from htm_pytorch.rl.rollout import Played, play
from htm_pytorch.rl.run import CURVE, METRICS, Run
from htm_pytorch.rl.stages import Recent, Stages
from htm_pytorch.shapes import check_kind


def train(config: TrainConfig, parts: Parts | None = None) -> Agent:
    """Train an agent, leave the run in `config.run_dir`, and return it.

    Args:
        config: everything.
        parts: of the agent, of the user's own.

    Raises:
        ValueError: names the option that cannot work; nothing was written. Or a loss was not
            finite; the checkpoint is the last good one.
    """
    check_kind("config", config, TrainConfig, "a TrainConfig")
    if restarted():
        config = config.replace(resume=True)
    world = World.join(config.device)
    with Training(config, parts, world) as training:
        while not training.is_done():
            training.batch()
        training.finish()
    return training.agent.eval()


class Training:
    """A training under way: everything that a batch changes.

    Args:
        config: everything.
        parts: of the agent, of the user's own.
        world: the processes that learn as one.
    """

    def __init__(self, config: TrainConfig, parts: Parts | None, world: World):
        self.config, self.world = config, world
        self.rows = world.rows(config.environments.num_envs)
        self.run: Run | None = None
        # The folder and the environments are given back also where nothing comes of it.
        with contextlib.ExitStack() as opened:
            self._open(opened, parts)
            self._opened = opened.pop_all()

    def _open(self, opened: contextlib.ExitStack, parts: Parts | None) -> None:
        """Make all parts; `opened` closes them."""
        config, world = self.config, self.world
        if world.rank == 0:
            self.agent = prepare(config, parts)
            self.run = opened.enter_context(Run(config))
        world.wait()
        if world.rank:
            self.agent = prepare(config.replace(resume=True), parts)
        self.learner = Learner(self.agent, config, world)
        self.batches, self.frames, self.episodes, self.seconds = 0, 0, 0, 0.0
        path = config.run_dir / CHECKPOINT
        progress = None
        if config.resume and path.exists():
            progress = self._restore(Checkpoint(path))
        self.stages = Stages(config, self.agent, self.rows, progress)
        opened.callback(self.stages.close)
        self.played: int | None = None
        self._begin()
        if world.rank == 0:
            self.board = self._make_board(opened)
            self.bar = self._make_bar(opened)

    def is_done(self) -> bool:
        """Say whether the budget is used, or the agent good enough."""
        budget = self.config.budget
        return self.frames >= budget.frames or self.stages.reached(budget.stop_at)

    def batch(self) -> None:
        """Play one rollout, learn from it, and write down how it went."""
        config, began = self.config, time.perf_counter()
        stage = self.stages.next(_generator(config.seed, self.batches, 2))
        player, recent = self.stages.players[stage], self.stages.recent[stage]
        if stage != self.played:
            # What came before was another environment's.
            self.learner.before = None
        self.played = stage
        if config.rollouts.rollout == "episodes":
            player.begin(seeds_of(config, self.batches, self.rows))
        generator = _generator(config.seed, self.batches)
        discount = config.learner.discount
        played = play(player, config.rollouts, generator, discount)
        progress = min(1.0, self.frames / config.budget.frames)
        losses = self.learner.learn(
            played.rollout, _generator(config.seed, self.batches, 1), progress
        )
        self._observe(played)
        self.batches += 1
        start = self.rows.start
        here = [episode._replace(row=episode.row + start) for episode in played.episodes]
        found = self.world.gather([*here, played.frames])
        frames = sum(one for one in found if isinstance(one, int))
        episodes = [one for one in found if not isinstance(one, int)]
        for episode in sorted(episodes, key=lambda e: (e.step, e.row)):
            recent.add(episode)
        self.frames += frames
        self.episodes += len(episodes)
        self.seconds += time.perf_counter() - began
        if self.world.rank == 0:
            self._write(stage, recent, losses, frames, time.perf_counter() - began)
        if self.stages.promote():
            self._begin()
        if self.is_done() or self.batches % config.budget.checkpoint_every == 0:
            self._save()

    def finish(self) -> None:
        """Draw the curve."""
        if self.run is not None:
            plot_curve(self.config.run_dir / METRICS, self.config.run_dir / CURVE)

    def _observe(self, played: Played) -> None:
        """Add what was played to the running statistics."""
        if self.agent.normalizer is not None:
            self.agent.normalizer.observe(played.rollout.seen, self.world.sum)  # pyright: ignore[reportCallIssue]
        if self.config.environments.normalize_rewards:
            self.agent.returns.moments.add(played.discounted[:, None], self.world.sum)

    def _begin(self) -> None:
        """Begin new episodes, with seeds that the batch decides, in a resumed run as in this."""
        self.learner.before = None
        self.stages.begin(seeds_of(self.config, self.batches, self.rows))

    def _save(self) -> None:
        if self.run is not None:
            progress = {
                "batches": self.batches,
                "frames": self.frames,
                "episodes": self.episodes,
                "seconds": self.seconds,
                **self.stages.progress(),
            }
            self.run.save(self.agent, self.learner.optimizer, progress)
        self.world.wait()
        self._begin()

    def _restore(self, checkpoint: Checkpoint) -> dict[str, Any]:
        checkpoint.restore_agent(self.agent)
        checkpoint.restore_optimizer(self.learner.optimizer)
        progress = checkpoint.progress
        self.batches, self.frames = progress["batches"], progress["frames"]
        self.episodes, self.seconds = progress["episodes"], progress["seconds"]
        return progress

    def _write(
        self, stage: int, recent: Recent, losses: Losses, frames: int, seconds: float
    ) -> None:
        budget = self.config.budget
        judged: float | str = ""
        if budget.eval_every and self.batches % budget.eval_every == 0:
            agent = self.agent.eval()
            judged = judge(agent, self.config, budget.eval_episodes, stage=self.stages.newest).mean
            self.agent.train()
        row: dict[str, Any] = {
            "batch": self.batches,
            "frames": self.frames,
            "episodes": self.episodes,
            "return": recent.mean(),
            "length": recent.length(),
            **losses._asdict(),
            "stage": stage,
            "unseen_return": judged,
            "seconds": round(self.seconds, 3),
        }
        if self.run is not None:
            self.run.add(row)
        if self.board is not None:
            for name, value in row.items():
                if value != "":
                    self.board.add_scalar(name, value, self.frames)
        self.bar.set_postfix_str(f"return {recent.mean():.3f}, {frames / seconds:,.0f} frames/s")
        self.bar.update(frames)

    def _make_board(self, opened: contextlib.ExitStack) -> Any:
        if not self.config.tensorboard:
            return None
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(self.config.run_dir, purge_step=self.frames + 1)
        return opened.enter_context(board)

    def _make_bar(self, opened: contextlib.ExitStack) -> Any:
        from tqdm import tqdm

        return opened.enter_context(
            tqdm(
                total=self.config.budget.frames,
                initial=self.frames,
                unit=" frames",
                unit_scale=True,
                desc="training",
                smoothing=0.05,
                disable=not sys.stderr.isatty(),
            )
        )

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: Any) -> None:
        self._opened.close()


def _generator(seed: int, *what: int) -> torch.Generator:
    """Return a generator that a resumed run, and another process, makes again."""
    (state,) = np.random.SeedSequence((seed, *what)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))

"""`htm`: parses, calls, prints."""

import sys
from pathlib import Path
from typing import Annotated


def main() -> None:
    """Run the command line."""
    try:
        import tyro

        from htm_pytorch.nn.check import CheckConfig
        from htm_pytorch.rl import TrainConfig
    except ImportError as error:
        sys.exit(f"htm: needs the extra `rl`, pip install '.[rl]' in the checkout ({error})")

    def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
        """Train an agent on Ballet, then judge it on unseen episodes."""
        from htm_pytorch.rl import train

        train(config)
        evaluate(config.run_dir)

    def check(config: Annotated[CheckConfig, tyro.conf.arg(name="")]) -> None:
        """Compare the layer on this machine with the plain reference: output and gradients."""
        from htm_pytorch.nn.check import check

        report = check(config)
        print(report)
        if not report.ok:
            sys.exit(1)

    try:
        tyro.extras.subcommand_cli_from_dict(
            {"train": train, "eval": evaluate, "check": check},
            prog="htm",
            description="Train and judge agents that remember; check the layer.",
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"htm: {error}")
    except KeyboardInterrupt:
        sys.exit("htm: stopped; htm train --resume goes on from the last checkpoint")


def evaluate(run_dir: Path, episodes: int | None = None, seed: int | None = None) -> None:
    """Judge a trained agent on unseen episodes and draw what it recalled in one.

    Args:
        run_dir: folder of the run.
        episodes: how many; default as the run's config says.
        seed: of the episodes; default one that the training did not use.
    """
    from htm_pytorch.rl import evaluate

    result = evaluate(run_dir, episodes, seed)
    print(
        f"success {result.success:.3f} on {result.episodes} unseen episodes "
        f"(chance {result.chance:.2f}); what it recalled: {result.picture}"
    )

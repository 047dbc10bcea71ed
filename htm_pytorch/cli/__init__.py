"""`htm`: parses, calls, prints."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated


def main() -> None:
    """Run the command line."""
    try:
        import tyro
    except ImportError as error:
        sys.exit(f"htm: needs the extra `rl` or `store`, pip install '.[rl]' ({error})")
    from htm_pytorch.check import CheckConfig

    def check(config: Annotated[CheckConfig, tyro.conf.arg(name="")]) -> None:
        """Compare the layer on this machine with the plain reference: output and gradients."""
        from htm_pytorch.check import check

        report = check(config)
        print(report)
        if not report.ok:
            sys.exit(1)

    def memory() -> None:
        """Look after a memory on disk: info, verify, save, compact, index, forget, repair."""

    commands: dict[str, Callable[..., None]] = {"check": check, "memory": memory}
    try:
        from htm_pytorch.rl import TrainConfig
    except ImportError as error:
        missing = f" (No train and eval: they need the extra `rl`; {error}.)"
    else:
        missing = ""

        def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
            """Train an agent on Ballet, then judge it on unseen episodes."""
            from htm_pytorch.rl import train

            train(config)
            evaluate(config.run_dir)

        commands = {"train": train, "eval": evaluate} | commands
    try:
        if sys.argv[1:2] == ["memory"]:
            from htm_pytorch.cli import memory as of_memory

            of_memory.main(sys.argv[2:])
            return
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="htm",
            description=f"Agents that remember, the layer, and memories on disk.{missing}",
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (ValueError, OSError, ImportError) as error:
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

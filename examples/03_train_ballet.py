"""Train the agent on 640 episodes of Ballet: too few to learn it, enough to see all parts.

`make demo` trains the same agent until it remembers.
"""

import csv
import tempfile
from pathlib import Path

from htm_pytorch.rl import evaluate, train
from htm_pytorch.tasks import find

task = find("ballet")
parts = task.parts()
with tempfile.TemporaryDirectory() as folder:
    config = task.config.replace(
        run_dir=Path(folder) / "run", num_envs=64, frames=640 * 44, eval_episodes=64
    )
    train(config, parts)
    result = evaluate(config.run_dir, parts=parts)

    with (config.run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    print("episodes  frames  success  entropy  reconstruction loss")
    for row in rows[::3]:
        print(
            f"{row['episodes']:>8}{row['frames']:>8}{float(row['return']):9.2f}"
            f"{float(row['entropy']):9.2f}{float(row['reconstruction_loss']):21.1f}"
        )
    print(f"unseen episodes: {result}; a walk to any dancer has a return of 0.5")
    print("in the run's folder:", *sorted(path.name for path in config.run_dir.iterdir()))

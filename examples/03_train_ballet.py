"""Train the agent on 640 episodes of Ballet: too few to learn it, enough to see all parts.

`make demo` trains the same agent until it remembers.
"""

import csv
import tempfile
from pathlib import Path

from htm_pytorch.rl import TrainConfig, evaluate, train

with tempfile.TemporaryDirectory() as folder:
    config = TrainConfig(
        run_dir=Path(folder) / "run",
        num_envs=64,
        episodes=640,
        eval_episodes=64,
    )
    train(config)
    result = evaluate(config.run_dir)

    with (config.run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    print("episodes  frames  success  entropy  reconstruction loss")
    for row in rows[::3]:
        print(
            f"{row['episodes']:>8}{row['frames']:>8}{float(row['success']):9.2f}"
            f"{float(row['entropy']):9.2f}{float(row['reconstruction_loss']):21.1f}"
        )
    print(
        f"unseen episodes: success {result.success:.2f}, a walk to any dancer {result.chance:.2f}"
    )
    print("in the run's folder:", *sorted(path.name for path in config.run_dir.iterdir()))

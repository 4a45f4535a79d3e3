"""Compress the pretrained ResNet-20: `python run.py --data DIR --weights DIR --latency 40% -o runs/cifar-40`."""

import argparse
import sys
from pathlib import Path

from task import task

from automl_compress import compress
from automl_compress.deploy.summary import summarize
from automl_compress.progress import make_progress

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--data", type=Path, help="folder of cifar10.npz or cifar-10-batches-py (default: $AC_DATA_DIR)")
arguments.add_argument("--weights", type=Path, help="folder of resnet20_cifar10.pt (default: $AC_WEIGHTS_DIR)")
for budget in ("latency", "size", "memory"):
    arguments.add_argument(f"--{budget}")
arguments.add_argument("--trials", type=int, default=100)
arguments.add_argument("--epochs", type=float, default=3)
arguments.add_argument("-o", "--output", type=Path, required=True)
given = vars(arguments.parse_args())

with make_progress(sys.stderr) as progress:
    result = compress(task(given.pop("data"), given.pop("weights")), progress=progress, **given)
print(summarize(result.to_json()))

"""The main job on real data in about two minutes: a budget in, a measured ONNX model out."""

import argparse
import tempfile
from pathlib import Path

from task import task

from automl_compress import compress

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("-o", "--output", type=Path, default=None, help="run folder (default: a new one)")
output = arguments.parse_args().output or Path(tempfile.mkdtemp(prefix="digits-")) / "run"

print("Training the teacher on handwritten digits, then compressing it to 50 % latency and 40 % size ...", flush=True)
result = compress(task(), latency="50%", size="40%", trials=40, epochs=6, output=output)
print(result.summary())
print(f"Open {output / 'report.html'} for what was done to each layer and why.")
raise SystemExit(0 if result.status == "met" else 3)

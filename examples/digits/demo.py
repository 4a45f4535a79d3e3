"""The main job on real data in about two minutes: a budget in, a measured ONNX model out."""

import argparse
import sys
import tempfile
from pathlib import Path

from task import task

from automl_compress import compress
from automl_compress.deploy.summary import summarize
from automl_compress.progress import make_progress

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("-o", "--output", type=Path, default=None, help="run folder (default: a new one)")
output = arguments.parse_args().output or Path(tempfile.mkdtemp(prefix="digits-")) / "run"

print("Training a teacher on handwritten digits, then compressing it to 35 % of its latency and 20 % of its size.")
with make_progress(sys.stderr) as progress:
    result = compress(task(), latency="35%", size="20%", trials=16, epochs=6, output=output, progress=progress)
print(summarize(result.to_json()))
print(f"Open {output / 'report.html'} for what was done to each layer and why.")
raise SystemExit(0 if result.status == "met" else 3)

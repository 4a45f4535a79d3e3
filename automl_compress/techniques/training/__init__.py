"""The training loop: lowers an objective on a task's data; a stop, a bad batch or a divergence costs little."""

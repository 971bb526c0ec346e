"""The files of a run's directory, by name."""

__all__ = ["CONFIG", "EVALUATIONS", "METRICS", "RECORD", "REPORT", "SAMPLES"]

# What the run is and was: `trainer/run_record.py`.
RECORD = "run.json"
# The accepted config.
CONFIG = "config.yaml"
# A row per step: `trainer/hooks/metrics.py`.
METRICS = "metrics.jsonl"
# The windows that each step read, with `data.log_samples`.
SAMPLES = "samples.jsonl"
# What was found beside the run, by step and task: `trainer/evaluation/record.py`.
EVALUATIONS = "evaluations.jsonl"
# A page on the run: `trainer/report/`.
REPORT = "report.html"

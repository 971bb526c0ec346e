"""The files of a run's directory, by name."""

__all__ = [
    "CONFIG",
    "EVALUATIONS",
    "GENERATED",
    "GENERATED_LAST",
    "METRICS",
    "RECORD",
    "REPORT",
    "SAMPLES",
    "STATISTICS",
]

# What the run is and was: `trainer/run_record.py`.
RECORD = "run.json"
# The accepted config.
CONFIG = "config.yaml"
# A row per step: `trainer/hooks/metrics.py`.
METRICS = "metrics.jsonl"
# The windows that each step read, with `data.log_samples`.
SAMPLES = "samples.jsonl"
# Norms by module, with `hook/statistics`.
STATISTICS = "statistics.jsonl"
# Texts generated while it trains, and at its end: `trainer/hooks/sample.py`.
GENERATED = "generated.jsonl"
GENERATED_LAST = "generated.txt"
# What was found beside the run, by step and task: `trainer/evaluation/record.py`.
EVALUATIONS = "evaluations.jsonl"
# A page on the run: `trainer/report/`.
REPORT = "report.html"

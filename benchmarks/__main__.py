"""Print each figure as a ratio against a baseline timed in this process, with its spread.

python -m benchmarks             everything
python -m benchmarks mask        only the sections whose name holds one of the words
"""

import platform
import sys

import torch

from benchmarks import (
    advice,
    attention,
    browser,
    cost,
    coverage,
    decoding,
    diagnose,
    encoding,
    explorers,
    judging,
    load,
    mask,
    objective,
    records,
    sampling,
    scheduling,
    serving,
    signals,
    traces,
    training_step,
)

SECTIONS = {
    "mask": mask.run,
    "sampling": sampling.run,
    "attention": attention.run,
    "objective": objective.run,
    "training_step": training_step.run,
    "decoding": decoding.run,
    "traces": traces.run,
    "records": records.run,
    "diagnose": diagnose.run,
    "signals": signals.run,
    "encoding": encoding.run,
    "coverage": coverage.run,
    "cost": cost.run,
    "scheduling": scheduling.run,
    "serving": serving.run,
    "advice": advice.run,
    "judging": judging.run,
    "load": load.run,
    "explorers": explorers.run,
    "browser": browser.run,
}


def main(words: list[str]) -> None:
    machine = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"torch {torch.__version__}, {machine}, {torch.get_num_threads()} threads, {device}")
    for name, run in SECTIONS.items():
        if not words or any(word in name for word in words):
            print(f"\n{name}")
            for line in run():
                print(f"  {line}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

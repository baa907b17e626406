"""The confidence head beside the drafter's own best logits, on every shipped drafter.

How well each signal tells accepted slots from rejected ones, and how fast it would serve.
"""

from collections.abc import Iterator

from dspark_lab.pairs import PAIRS, load_traces
from dspark_lab.rates import signal_table
from dspark_lab.serving import load_engine, signal_speeds


def run() -> Iterator[str]:
    for pair in PAIRS:
        traces, engine = load_traces(pair), load_engine(pair)
        table = signal_table(traces)
        for key, trace in traces.groupby(["drafter", "temperature"], sort=False):
            drafter, temperature = key
            yield f"{pair}, {drafter}, temperature {temperature:g}"
            own = table[(table["drafter"] == drafter) & (table["temperature"] == temperature)]
            speeds = signal_speeds(trace, engine)
            for row in own.to_dict("records"):
                found = speeds[speeds["signal"] == row["signal"]].to_dict("records")
                yield (
                    f"  {row['signal']:<14} AUROC {row['auroc']:.3f}, over the head "
                    f"{row['over_head']:+.3f} ({row['over_head_low']:+.3f} to "
                    f"{row['over_head_high']:+.3f}), error {row['ece']:.3f} "
                    f"({row['ece_low']:.3f} to {row['ece_high']:.3f})"
                )
                for one in found:
                    yield (
                        f"  {'':<14} {one['concurrency']:>2} requests: threshold "
                        f"{one['threshold']:.2f}, speed-up {one['speedup']:.3f} "
                        f"({one['speedup_low']:.3f} to {one['speedup_high']:.3f}), "
                        f"scheduler {one['scheduled']:.3f}"
                    )

"""What DALL·E Mega's step takes on slices of v3 of up to 256 cores: arithmetic from two compiled plans of v3-256.

    dalle-torch plan --config configs/train/mega-v3-256.yaml --output plans/mega
    dalle-torch plan --config configs/train/mega-v3-256.yaml --output plans/one-pass --only without-roots \\
        --set training.accumulation_steps=1
    python -m benchmarks.scaling plans/one-pass/plan.json plans/mega/plan.json

A plan counts products, memory traffic and bytes sent of a step. Two that differ in their passes alone tell what a pass
takes, and what an update takes beside its passes. Another slice has other numbers of passes, of rows in a pass, and of
copies (dp), while a core keeps the same eighth of the model:

- a pass takes what it takes there;
- what an update takes beside them stays, but for Shampoo's roots, which all cores share;
- weights, momenta and diagonal statistics of a core stay; Shampoo's statistics and preconditioners are spread over all
  cores.

Of more cores that is not true: each keeps a block of every stack, and has fewer rows in a pass. Nor need it be: those
slices have one or two passes, which compile in a minute and a half.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
SLICES = {32: 24, 64: 12, 128: 6, 256: 3}
"""Cores: passes of 44 rows for each group of 8, 4224 samples an update."""
ROWS = 44
SPREAD = ("statistics", "preconditioners")
"""Inputs that lie over all cores."""


@dataclass(frozen=True)
class Parts:
    """Of one kind of step and one quantity: what a pass takes, and what there is beside passes."""

    of_pass: float
    beside: float

    def of(self, passes: int) -> float:
        return self.of_pass * passes + self.beside


def of_pass(one: dict[str, Any], three: dict[str, Any], quantity: str) -> float:
    """From steps of a kind with one pass and with three."""
    return (_value(three, quantity) - _value(one, quantity)) / 2


def _value(step: dict[str, Any], quantity: str) -> float:
    if quantity == "sent":
        return float(sum(collective["moved"] for collective in step["collectives"]))
    return float(step["work"][quantity])


def seconds(plan: dict[str, Any], work: dict[str, float]) -> dict[str, float]:
    """Of products, memory and links alone, at the chip's published rates."""
    chip = plan["topology"]["chip"]
    rates = {"passes": chip["tflops"] * 1e12, "bytes": chip["memory_rate"], "sent": chip["link_rate"]}
    return {quantity: value * chip["cores"] / rates[quantity] for quantity, value in work.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path, help="plan.json of one pass")
    parser.add_argument("three", type=Path, help="plan.json of three passes")
    args = parser.parse_args()
    one, three = (json.loads(path.read_text(encoding="utf-8")) for path in (args.one, args.three))
    steps = {step["kind"]: step for step in three["steps"]}
    (short,) = (step for step in one["steps"] if step["kind"] == "without roots")
    share = 1 / three["roots_every"] if three["roots_every"] else 0.0
    found: dict[str, dict[str, Parts]] = {kind: {} for kind in steps}
    for quantity in ("passes", "bytes", "sent"):
        each = of_pass(short, steps["without roots"], quantity)
        for kind, step in steps.items():
            found[kind][quantity] = Parts(each, _value(step, quantity) - 3 * each)
    names = {"passes": "products", "bytes": "memory", "sent": "links"}
    print("| slice | dp x mp | samples | arguments, GiB | s an update | samples/s | utilisation | limit |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for cores, passes in SLICES.items():
        work = dict.fromkeys(names, 0.0)
        for kind, quantities in found.items():
            weight = 1.0 if len(found) == 1 else share if kind == "with roots" else 1 - share
            for quantity, part in quantities.items():
                beside = part.beside
                if kind == "with roots" and quantity == "passes":
                    plain = found["without roots"][quantity].beside
                    beside = plain + (beside - plain) * 256 / cores
                work[quantity] += weight * Parts(part.of_pass, beside).of(passes)
        taken = seconds(three, work)
        least, most = max(taken.values()), sum(taken.values())
        samples = ROWS * passes * cores // 8
        inputs = steps["without roots"]["inputs"]
        arguments = sum(value * (256 / cores if kind in SPREAD else 1) for kind, value in inputs.items())
        peak_flops = cores * three["topology"]["chip"]["tflops"] * 1e12 / three["topology"]["chip"]["cores"]
        print(
            f"| v3-{cores} | {cores // 8} x 8 | {ROWS} x {cores // 8} x {passes} = {samples} | {arguments / GIB:.2f} | "
            f"{least:.2f} to {most:.2f} | {samples / most:,.0f} to {samples / least:,.0f} | "
            f"{three['flops'] / most / peak_flops:.0%} to {three['flops'] / least / peak_flops:.0%} | "
            f"{names[max(taken, key=lambda quantity: taken[quantity])]} |"
        )


if __name__ == "__main__":
    main()

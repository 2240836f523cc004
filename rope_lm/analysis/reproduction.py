"""Comparison of a report's summary with an archived one."""

from typing import Any, NamedTuple

SAME_START = 1e-5  # nats: loss at step 0 on the same text


class Row(NamedTuple):
    """One value that is compared with the archive."""

    name: str
    archived: str
    here: str
    agrees: bool | None  # None: not compared, because the text differs


def check(summary: dict[str, Any], archived: dict[str, Any]) -> list[Row]:
    """Return rows for the arms, the order of their final losses, overlapping intervals, losses at step 0 and batches.

    Two arms of a setting whose archived intervals overlap may end in either order. If the fingerprint of the text
    differs, as it does between Python versions, losses differ too: then only the arms and their order are compared.
    """
    # Sweeps are named too if settings and arms do not identify an arm.
    several = any(len({_name(arm) for arm in side["arms"]}) < len(side["arms"]) for side in (summary, archived))
    ours, theirs = ({_name(arm, several): arm for arm in side["arms"]} for side in (summary, archived))
    same_text = summary["fingerprint"].get("text") == archived["fingerprint"].get("text")
    both = [name for name in theirs if name in ours]
    rows = [Row("arms", ", ".join(sorted(theirs)), ", ".join(sorted(ours)), set(theirs) <= set(ours))]
    for i, a in enumerate(both):
        for b in (name for name in both[i + 1 :] if _group(theirs[name]) == _group(theirs[a])):
            first, second = sorted((a, b), key=lambda name: theirs[name]["final_nats"]["mean"])
            if _interval(theirs[first])[1] < _interval(theirs[second])[0]:
                agrees = _paired_difference(ours[first], ours[second]) < 0
                rows.append(Row(f"{first} ends below {second}", "yes", "yes" if agrees else "no", agrees))
    for name in both:
        rows += [row if same_text else row._replace(agrees=None) for row in _arm_rows(name, theirs[name], ours[name])]
    return rows


def _arm_rows(name: str, archived: dict[str, Any], here: dict[str, Any]) -> list[Row]:
    """Return the rows of one arm, on the assumption that the text is the same."""
    (a, b), (c, d) = _interval(archived), _interval(here)
    rows = [Row(f"final nats of {name}", f"{a:.3f} to {b:.3f}", f"{c:.3f} to {d:.3f}", max(a, c) <= min(b, d))]
    for seed in sorted(archived["first_nats"].keys() & here["first_nats"].keys()):
        x, y = archived["first_nats"][seed], here["first_nats"][seed]
        rows.append(Row(f"loss at step 0 of {name}, seed {seed}", f"{x:.6f}", f"{y:.6f}", abs(x - y) <= SAME_START))
    consumed = archived.get("batches", {})  # archives older than the hashes have none
    for seed in sorted(consumed.keys() & here["batches"].keys()):
        x, y = consumed[seed], here["batches"][seed]
        rows.append(Row(f"batches consumed by {name}, seed {seed}", x[:16], y[:16], x == y))
    return rows


def reproduced(rows: list[Row]) -> bool:
    """Return True if nothing that was compared disagrees."""
    return all(row.agrees is not False for row in rows)


def _group(arm: dict[str, Any]) -> tuple[str, str]:
    """Return the sweep and the setting, within which arms are compared."""
    return arm["sweep"], arm.get("setting", "")


def _name(arm: dict[str, Any], with_sweep: bool = False) -> str:
    sweep, setting = _group(arm)
    return "/".join(filter(None, (sweep if with_sweep else "", setting, arm["arm"])))


def _interval(arm: dict[str, Any]) -> tuple[float, float]:
    final = arm["final_nats"]
    return (final["mean"], final["mean"]) if final["low"] is None else (final["low"], final["high"])


def _paired_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Return the mean over common seeds of a's final loss minus b's, in nats."""
    a, b = a["final_nats"]["by_seed"], b["final_nats"]["by_seed"]
    seeds = a.keys() & b.keys()
    return sum(a[seed] - b[seed] for seed in seeds) / max(1, len(seeds))

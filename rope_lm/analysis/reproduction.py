"""Whether a summary reproduces an archived one."""

from typing import Any, NamedTuple

SAME_START = 1e-5  # nats: the loss at step 0, on the same text


class Row(NamedTuple):
    """One thing that was held against the archive."""

    what: str
    archived: str
    here: str
    agrees: bool | None  # None: it was not compared, since the text is another one


def hold(summary: dict[str, Any], archived: dict[str, Any]) -> list[Row]:
    """Rows for: the arms, the paired ordering of their final losses, overlapping seed intervals, the loss at step 0,
    the batches that were consumed.

    Two arms of a setting whose archived intervals overlap may stand in either order. Another text (its fingerprint
    differs, as it does between Python versions) gives other losses: then only the ordering is held.
    """
    # By their sweeps too, where their settings and names do not tell them apart.
    several = any(len({_name(arm) for arm in each["arms"]}) < len(each["arms"]) for each in (summary, archived))
    name = lambda arm: f"{arm['sweep']}/{_name(arm)}" if several else _name(arm)  # noqa: E731
    ours, theirs = ({name(arm): arm for arm in each["arms"]} for each in (summary, archived))
    rows = [Row("arms", ", ".join(sorted(theirs)), ", ".join(sorted(ours)), set(theirs) <= set(ours))]
    both = [name for name in theirs if name in ours]
    same_text = summary["fingerprint"].get("text") == archived["fingerprint"].get("text")
    for i, a in enumerate(both):
        for b in (each for each in both[i + 1 :] if _group(theirs[each]) == _group(theirs[a])):
            first, second = sorted((a, b), key=lambda name: theirs[name]["final_nats"]["mean"])
            if _interval(theirs[first])[1] < _interval(theirs[second])[0]:
                good = bool(_paired_difference(ours[first], ours[second]) < 0)
                rows.append(Row(f"{first} ends below {second}", "yes", "yes" if good else "no", good))
    for name in both:
        (a, b), (c, d) = _interval(theirs[name]), _interval(ours[name])
        agrees = bool(max(a, c) <= min(b, d)) if same_text else None
        rows.append(Row(f"final nats of {name}", f"{a:.3f} to {b:.3f}", f"{c:.3f} to {d:.3f}", agrees))
        for seed in sorted(theirs[name]["first_nats"].keys() & ours[name]["first_nats"].keys()):
            x, y = theirs[name]["first_nats"][seed], ours[name]["first_nats"][seed]
            agrees = bool(abs(x - y) <= SAME_START) if same_text else None
            rows.append(Row(f"loss at step 0 of {name}, seed {seed}", f"{x:.6f}", f"{y:.6f}", agrees))
        consumed = theirs[name].get("batches", {})  # an archive from before they were hashed has none
        for seed in sorted(consumed.keys() & ours[name]["batches"].keys()):
            x, y = consumed[seed], ours[name]["batches"][seed]
            agrees = x == y if same_text else None
            rows.append(Row(f"batches consumed by {name}, seed {seed}", x[:16], y[:16], agrees))
    return rows


def _setting(arm: dict[str, Any]) -> str:
    return arm.get("setting", "")  # an archive from before there were settings has none


def _group(arm: dict[str, Any]) -> tuple[str, str]:
    """Of arms that are compared: the sweep and the setting."""
    return arm["sweep"], _setting(arm)


def _name(arm: dict[str, Any]) -> str:
    return f"{_setting(arm)}/{arm['arm']}" if _setting(arm) else arm["arm"]


def reproduced(rows: list[Row]) -> bool:
    """Whether nothing that could be compared disagrees."""
    return all(row.agrees is not False for row in rows)


def _interval(arm: dict[str, Any]) -> tuple[float, float]:
    final = arm["final_nats"]
    return (final["mean"], final["mean"]) if final["low"] is None else (final["low"], final["high"])


def _paired_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Mean over common seeds of a's final loss less b's, in nats."""
    a, b = a["final_nats"]["by_seed"], b["final_nats"]["by_seed"]
    seeds = a.keys() & b.keys()
    return sum(a[seed] - b[seed] for seed in seeds) / max(1, len(seeds))

"""summary.json: everything on the page, as data. A number that does not exist is null."""

import json
import math
from typing import Any

from rope_lm.analysis.comparison import Arm, Comparison
from rope_lm.analysis.estimates import Effect
from rope_lm.analysis.findings import Findings

SCHEMA = 2
EFFECT = ("mean", "low", "high", "bound", "n", "p")
VERDICT = ("study", "name", "claim", "sentence", "late", *EFFECT, "p_holm", "verdict", "unit")
GAP = ("mean", "low", "high", "p", "bound")
SPEEDUP = (*EFFECT, "target", "verdict")


def summarize(findings: Findings) -> dict[str, Any]:
    """Return the summary as plain JSON data."""
    value = {
        "schema": SCHEMA,
        "command": findings.command,
        "treatment": findings.treatment,
        "claims": [_pick(verdict, *VERDICT) for verdict in findings.claims],
        "matrix": [
            {
                "sweep": row.sweep.name,
                "setting": row.sweep.setting,
                "treatment": row.treatment,
                "cells": {arm.name: _speedup(contrast.steps) for arm, contrast in row.tested},
            }
            for row in findings.matrix
        ],
        "factors": [
            {
                "sweep": factor.sweep.name,
                "of": factor.key,
                "values": factor.values,
                "settings": [setting.sweep.setting for setting in factor.settings],
            }
            for factor in findings.factors
        ],
        "settings": [_setting(comparison) for comparison in findings.comparisons if comparison.arms],
        "arms": [_arm(comparison, arm) for comparison in findings.comparisons for arm in comparison],
        "tuning": [
            _pick(tuning, "arm", "setting", "best", "learning_rates", "final_nats", "seeds")
            for section in findings.sections
            for tuning in section.tunings
        ],
        "sensitivity": [
            {
                "setting": section.sweep.setting,
                **_pick(found, "baseline", "learning_rates"),
                "shared": [_speedup(speedup) for speedup in found.shared],
                "tuned": _speedup(found.tuned),
            }
            for section in findings.sections
            for found in section.sensitivities
        ],
        "fingerprint": findings.manifest.get("data", {}).get("fingerprint", {}),
        "device": findings.manifest.get("device", {}),
        "versions": findings.manifest.get("versions", {}),
        "methods": findings.methods,
        "warnings": findings.warnings,
        "runs": [
            {"sweep": sweep.name, "arm": run.arm, "commit": run.manifest.get("commit", "")}
            | {"status": run.status["status"], "step": run.status.get("step"), "why": run.status.get("why", "")}
            | _pick(run, "seeds", "learning_rates", "hours")
            for sweep, run in findings.runs
        ],
    }
    return json.loads(json.dumps(finite(value)))  # NumPy's numbers become Python's


def _setting(comparison: Comparison) -> dict[str, Any]:
    return {
        "sweep": comparison.sweep.name,
        "setting": comparison.sweep.setting,
        **_pick(comparison.arms[0].run, "objective", "attention"),
        "unit": comparison.unit,
        "floor": comparison.floor._asdict(),
    }


def _arm(comparison: Comparison, arm: Arm) -> dict[str, Any]:
    run, found = arm.run, arm.contrast
    read = run.measured.get("extrapolation", {"rows": []})["rows"]
    return {
        "sweep": comparison.sweep.name,
        "setting": comparison.sweep.setting,
        "arm": arm.name,
        "encoding": run.encoding,
        "seeds": [curve.seed for curve in run.curves],
        "learning_rate": run.learning_rates[0],
        "status": run.status["status"],
        "final_nats": arm.final._asdict() | {"by_seed": {str(curve.seed): curve.final for curve in run.curves}},
        "first_nats": {str(curve.seed): float(curve.nats[0]) for curve in run.curves},
        **_pick(run, "batches"),
        **_pick(arm, "bits_per_byte", "area"),
        "itself": _speedup(arm.itself),
        "beyond": [{key: row[key] for key in ("multiple", "scaling", "seeds", "apart", "sliding")} for row in read],
        "treatment": comparison.treatment,
        "steps_to_target": {"target": arm.target, "own": arm.steps, "treated": arm.treated_steps},
        "speedup": found
        and {
            **_pick(found.steps, *SPEEDUP),
            "p_holm": arm.p_holm,
            "in_seconds": _speedup(found.costs.seconds),
            "in_flops": _speedup(found.costs.flops),
            "to_median": _speedup(found.median.steps),
            "to_common": _speedup(found.common.steps),
            "detectable": found.detectable,
        },
        "gap": found and {key: _pick(getattr(found, key), *GAP) for key in ("final", "area")},
        "profile": [_pick(s, "target", "mean", "low", "high", "bound") for s in (found.profile if found else [])],
        "tokens_per_second": run.tokens_per_second,
        "overhead": arm.overhead,
        "parameters": run.manifest["parameters"],
        "parameters_position": run.manifest["parameters_position"],
    }


def _speedup(speedup: Effect | None) -> dict[str, Any] | None:
    return _pick(speedup, *SPEEDUP) if speedup else None


def _pick(value: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


def finite(value: Any) -> Any:
    """Return JSON data with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(nested) for key, nested in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(nested) for nested in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

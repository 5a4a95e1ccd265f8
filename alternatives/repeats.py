"""--repeat: what several seeds say together."""

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any


def summary(reports: list[Any], run: Path) -> Any:
    """A report with mean, standard deviation and 95 % interval (Student's t); keeps the model of the lowest loss."""
    from scipy.stats import t

    best = min(reports, key=lambda report: min(row["valid_loss"] or 0.0 for row in report.history))
    results = best.results | {"seconds": sum(report.results["seconds"] for report in reports), "kept": best.run.name}
    print()
    for key, what in {"test_accuracy": "", "test_views_accuracy": f" with {results.get('test_views')} views"}.items():
        if key in results:
            values = [report.results[key] for report in reports]
            mean, std = statistics.fmean(values), statistics.stdev(values)
            half = float(t.ppf(0.975, len(reports) - 1)) * std / math.sqrt(len(reports))
            low, high = max(0.0, mean - half), min(1.0, mean + half)
            results |= {key: mean, f"{key}_std": std, f"{key}_interval": [low, high]}
            spread = f"standard deviation {100 * std:.2f}, 95 % interval {100 * low:.2f} to {100 * high:.2f} %"
            print(f"Mean test accuracy of {len(reports)} seeds{what}: {100 * mean:.2f} %, {spread}")
    print(f"All else but the time is of the kept model: {best.run.name}")
    results["repeats"] = [report.results for report in reports]
    return dataclasses.replace(best, results=results, run=run)

"""The HTML report of runs: settings, results, privacy spent, attacks and costs."""

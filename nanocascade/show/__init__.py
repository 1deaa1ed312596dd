"""Pages of runs: the files of a run or a cascade as one HTML page."""

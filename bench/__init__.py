"""What measures: figures are ratios and medians of interleaved rounds of one run."""

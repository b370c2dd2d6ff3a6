"""Evaluation: confusion matrices, the loop over a benchmark, what can be resumed, the protocol and the report."""

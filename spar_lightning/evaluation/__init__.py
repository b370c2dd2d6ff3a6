"""Evaluation on segmentation benchmarks: data, confusion matrices, resumable evaluation, protocols and reports."""

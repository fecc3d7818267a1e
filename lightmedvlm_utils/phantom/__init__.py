"""Synthetic chest radiographs and reports: a data set without patients, with known ground truth."""

"""What a model is worth: metrics, their uncertainty, baselines, and the records that every table is made from."""

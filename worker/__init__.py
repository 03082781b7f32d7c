"""The driver of one job: stages as Ray tasks, results in the storage root, the record in MLflow."""

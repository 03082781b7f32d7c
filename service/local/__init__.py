"""The embedded stack: MLflow, a Ray head, the API and the controller as children of one process (`ncfm up`)."""

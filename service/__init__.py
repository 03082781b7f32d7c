"""The service: accepts jobs over HTTP, keeps them in a database, runs them on a Ray cluster."""

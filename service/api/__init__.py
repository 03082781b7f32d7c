"""The HTTP API: jobs in, states, events and distilled sets out. Talks to the database and reads the storage root.

Never imports torch, ray or mlflow: its process starts in about a second and outlives all three.
"""

from service.api.app import create_app
from service.api.server import main

__all__ = ["create_app", "main"]

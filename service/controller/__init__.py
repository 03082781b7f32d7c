"""The controller: admits jobs, submits them to Ray, follows and ends them: it sees, decides and acts, round by round."""

from service.controller.loop import Controller
from service.controller.process import main

__all__ = ["Controller", "main"]

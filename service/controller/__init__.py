"""The controller: admits jobs, submits them to Ray, follows and ends them: it sees, decides and acts, round by round."""

from service.controller.loop import Controller, main

__all__ = ["Controller", "main"]

"""Migrations of the database, in the order of their numbers. Each adds; what it replaces is removed by a later release."""

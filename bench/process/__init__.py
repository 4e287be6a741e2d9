"""This process and its machine: environment, logs, console, watchdog."""

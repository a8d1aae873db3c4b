"""What the stages share: messages, channels, runners, the supervisor and the command line."""

__version__ = "0.1.0"

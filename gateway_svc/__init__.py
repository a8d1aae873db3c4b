"""The gateway stage: HTTP on one side, the messages of open requests on the other."""

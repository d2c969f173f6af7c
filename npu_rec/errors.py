"""Errors that a person caused and a person can mend: shown as one line, exit code 2."""


class UserError(Exception):
    """Bad usage, configuration or data. The message says what is wrong, where, and what to do."""


class ConfigError(UserError):
    """A configuration file or an override cannot be used."""


class DataError(UserError):
    """A data file cannot be used. The message names file, row and column where they are known."""


class DeviceError(UserError):
    """The requested device is absent or unusable."""


class BackendError(UserError):
    """A forced operator backend cannot run the request."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or does not fit the model."""

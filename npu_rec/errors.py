"""Errors that the command line shows as one line: of the user (exit code 2), of a run (1)."""


class UserError(Exception):
    """Bad usage, configuration or data. The message says what is wrong, where, and what to do."""


class TrainingError(Exception):
    """Training or a check cannot go on: shown as one line, exit code 1."""


class DistributedError(TrainingError):
    """A collective failed: another rank has died, or the network is down. The message names rank and operation."""


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


class StorageError(UserError):
    """Rows on a disk cannot be read or written: a folder or space is missing, or the file is not the one expected."""

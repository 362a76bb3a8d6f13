"""What can go wrong with data at run time; each message names the file or value and what to do about it."""

import errno

# Of an OSError that says nothing about the file.
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class DataError(Exception):
    """Base of the errors below; command lines print the message and end with exit code 2, what was named must change,
    or 1 for a MachineError."""


class MachineError(DataError):
    """The machine or the network fails, not the data nor what was asked for: a full disk, too little memory, a store
    that does not answer."""


class CorpusError(DataError):
    """A prepared corpus that is missing, incomplete, altered, or belongs to another tokenizer."""


class ReadingError(CorpusError, MachineError):
    """A corpus that the machine or the network cannot read now.

    Never skipped as a damaged shard is: samples would be lost that are there.
    """


class PrepareError(DataError):
    """A preparation that cannot start or go on."""


class BrokenOffError(PrepareError, MachineError):
    """A preparation that the machine or the network broke off; the same command goes on."""


class TokenizerError(DataError):
    """A tokenizer that cannot be trained, read or used."""

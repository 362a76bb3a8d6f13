"""What can go wrong with data at run time; each message names the file or value and what to do about it."""

import errno

# Of an OSError that says nothing about the file.
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class DataError(Exception):
    """Base of the errors below; command lines print the message and end with exit code 1."""


class CorpusError(DataError):
    """A prepared corpus that is missing, incomplete, altered, or belongs to another tokenizer."""


class ReadingError(CorpusError):
    """The machine or the network fails, not the corpus: a full disk, a store that does not answer, too many open files.

    Never skipped as a damaged shard is: samples would be lost that are there.
    """


class PrepareError(DataError):
    """A preparation that cannot start or go on."""


class TokenizerError(DataError):
    """A tokenizer that cannot be trained, read or used."""

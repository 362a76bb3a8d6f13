"""What can go wrong with data at run time; each message names the file or value and what to do about it."""


class DataError(Exception):
    """Base of the errors below; command lines print the message and end with exit code 1."""


class CorpusError(DataError):
    """A prepared corpus that is missing, incomplete, altered, or belongs to another tokenizer."""


class PrepareError(DataError):
    """A preparation that cannot start or go on."""


class TokenizerError(DataError):
    """A tokenizer that cannot be trained, read or used."""
